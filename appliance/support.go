package appliance

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
	"yinjian/hsm"
	"yinjian/tsa"
)

// SofttokenSocket and AdminSocket are the unix sockets below the appliance's folder.
func SofttokenSocket(dir string) string { return filepath.Join(dir, "softtoken", "p11.sock") }

// AdminSocket is where the command line administers a running appliance.
func AdminSocket(dir string) string { return filepath.Join(dir, "run", "admin.sock") }

// superviseSofttoken keeps the software cipher machine running as a child. A crash is started again, with a pause that
// grows; a child that cannot stay up for long is left to the operator's eyes in the log, never given up.
//
// It keeps its thread, whose end with ours makes the kernel kill the child: one that hangs would not see its standard
// input end, and would keep its folder from the next.
func (a *Appliance) superviseSofttoken(ctx context.Context, command []string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pause := 100 * time.Millisecond
	for {
		begun := a.sys.Monotonic()
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stderr = os.Stderr // it has a log of its own, in the same form
		// A group of its own: Ctrl-C reaches us, and we stop it in order.
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
		stdin, err := cmd.StdinPipe() // its end tells the child that we are gone
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			return fmt.Errorf("software cipher machine: %w", err)
		}
		a.softtoken.Store(cmd.Process)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		up := make(chan struct{})
		starting, started := context.WithCancel(ctx)
		go func() {
			if WaitForSocket(starting, SofttokenSocket(a.dir), time.Hour) == nil {
				close(up)
			}
		}()
		for running := true; running; {
			select {
			case <-up:
				a.softtokenDown.Store(false)
				up = nil
			case <-ctx.Done():
				started()
				_ = stdin.Close()
				_ = cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
				select {
				case <-ended:
				case <-time.After(10 * time.Second):
					_ = cmd.Process.Kill()
					<-ended
				}
				return nil
			case err := <-ended:
				a.softtokenDown.Store(true)
				a.log.WithError(err).Error("the software cipher machine ended; starting it again")
				running = false
			}
		}
		started()
		if a.sys.Monotonic()-begun > time.Minute {
			pause = 100 * time.Millisecond
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// WaitForSocket waits until somebody listens on the unix socket.
func WaitForSocket(ctx context.Context, path string, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", path, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// ReadSecret reads a PIN file: one line, readable by its owner alone.
func ReadSecret(name string) ([]byte, error) {
	st, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("%s: 权限 %#o，他人可读；请 chmod 600 (others may read it; chmod 600)", name, st.Mode().Perm())
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("%s: 空文件 (empty)", name)
	}
	return b, nil
}

// unfinished ends the names that writeFile gives before a file is whole.
const unfinished = ".part"

// removeUnfinished removes what a stop inside writeFile has left.
func removeUnfinished(dir string) error {
	var errs []error
	for _, folder := range []string{dir, filepath.Join(dir, "run"), filepath.Join(dir, "secrets")} {
		left, _ := filepath.Glob(filepath.Join(folder, ".*"+unfinished)) // the pattern is well-formed
		for _, name := range left {
			errs = append(errs, os.Remove(name))
		}
	}
	return errors.Join(errs...)
}

// writeFile replaces a file so that a stop at any point leaves the old or the new one: temporary name, fsync, rename,
// fsync of the folder.
func writeFile(name string, data []byte, perm os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-*"+unfinished)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already after the rename
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(perm), f.Sync(), f.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(f.Name(), name); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(name))
}

// removeFile removes a file, durably.
func removeFile(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(name))
}

func syncFolder(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// macKeys reaches the secret keys of the log slot. It satisfies account.MAC.
type macKeys struct{ token hsm.Token }

func (m macKeys) MAC(ctx context.Context, label string, data []byte) ([]byte, error) {
	return m.token.Do(ctx, label, hsm.MACSM3, data)
}

// headSealer seals the journal's end. It satisfies audit.MAC.
type headSealer struct{ keys macKeys }

func (s headSealer) MAC(ctx context.Context, data []byte) ([]byte, error) {
	return s.keys.MAC(ctx, headLabel, data)
}

// A keyCache hands out staff keys for signing, described by their certificates, so that no search is made on the hot
// path. It reaches the staff slot only.
type keyCache struct {
	token  hsm.Token
	verify bool
	mu     sync.RWMutex
	keys   map[string]*hsm.Key // guarded by mu, by label; labels are never given twice
}

// Key satisfies sign.Keys.
func (k *keyCache) Key(_ context.Context, label string, certificate []byte) (*hsm.Key, error) {
	k.mu.RLock()
	key := k.keys[label]
	k.mu.RUnlock()
	if key != nil {
		return key, nil
	}
	cert, err := smx509.ParseCertificate(certificate)
	if err != nil {
		return nil, err
	}
	alg := hsm.SM2
	if cert.PublicKeyAlgorithm == smx509.RSA {
		alg = hsm.RSA2048
	}
	key, err = hsm.KeyOf(k.token, hsm.KeyInfo{Label: label, Algorithm: alg, Public: cert.PublicKey}, k.verify)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	k.keys[label] = key
	k.mu.Unlock()
	return key, nil
}

// Wrapped satisfies sign.Keys.
func (k *keyCache) Wrapped(w *hsm.WrappedKey) (*hsm.Key, error) { return hsm.KeyOfWrapped(k.token, w) }

// checkpointStamper stamps checkpoints; their tokens never become leaves.
type checkpointStamper struct {
	a    *Appliance
	unit sign.Stamper
}

// Stamp refuses when no signature would be stamped by the unit either: evidence has its checkpoint's token, and with one under a
// certificate that was revoked before it would be invalid.
func (c checkpointStamper) Stamp(ctx context.Context, data []byte) ([]byte, error) {
	if chain, r := c.unit.Chain(), c.a.clock.Now(); len(chain) > 0 && r.Trusted() {
		if _, err := c.a.directory.Standing(chain, pki.TimeStamping, r.Time); err != nil {
			return nil, err
		}
	}
	t, err := c.unit.Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf(data), CertReq: true})
	if err != nil {
		return nil, err
	}
	return t.DER, nil
}

// checkRoom refuses to start on a full volume, where each part would fail in words of its own.
func checkRoom(dir string) error {
	const bytes, files = 1 << 20, 16
	var fs syscall.Statfs_t
	if err := syscall.Statfs(dir, &fs); err != nil {
		return err
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < bytes || fs.Files > 0 && fs.Ffree < files { // some file systems count no files
		return noRoomError{dir, free >> 10, fs.Ffree}
	}
	return nil
}

// A noRoomError is a volume that is full.
type noRoomError struct {
	dir              string
	kibibytes, files uint64
}

func (e noRoomError) Error() string {
	return fmt.Sprintf("%s: 磁盘空间不足，剩 %d KiB、%d 个文件；请清理或扩容后重启 (no room on the volume: %d KiB and %d files are free; make room and start again)",
		e.dir, e.kibibytes, e.files, e.kibibytes, e.files)
}

// reserve refuses signatures when the disk is nearly full.
func (a *Appliance) reserve() error {
	free, err := a.journal.FreeBytes()
	if err != nil {
		return err
	}
	if free < a.cfg.Policy.ReserveBytes {
		return fmt.Errorf("%d MiB free, %d MiB are kept in reserve", free>>20, a.cfg.Policy.ReserveBytes>>20)
	}
	// A few entries may wait for their seal while the cipher machine's log slot is away; a whole day of signatures that a
	// power cut would put in doubt may not.
	if size, sealed := a.journal.Size(), a.journal.SealedTo(); size > sealed+maxUnsealed {
		return problem.New(problem.JournalUnwritable, fmt.Sprintf("日志已有 %d 条未能由密码机封存，拒绝签名 (%d entries of the journal are not sealed: the cipher machine's log slot does not answer)", size-sealed, size-sealed),
			"请管理员检查密码机；恢复后用同一 Idempotency-Key 重试 (ask an administrator; retry with the same key)")
	}
	if err := a.journal.Failed(); err != nil {
		return problem.New(problem.JournalUnwritable, "日志已停止写入，拒绝签名 (the journal is closed for writing)", "请管理员检查运行日志 (ask an administrator)").With(err)
	}
	return nil
}

// maxUnsealed is how many entries may stand unsealed before signing is refused; they would need an operator's word after
// a power cut.
const maxUnsealed = 1000

// tokenReserve refuses tokens for others earlier than signatures, so that a stranger's tokens never use up the room
// that records need.
func (a *Appliance) tokenReserve() error {
	if err := a.reserve(); err != nil {
		return err
	}
	var fs syscall.Statfs_t
	if err := syscall.Statfs(a.dir, &fs); err != nil {
		return err
	}
	if total := fs.Blocks; total > 0 && fs.Bavail*100/total < uint64(a.cfg.Policy.TSAReservePercent) {
		return fmt.Errorf("less than %d %% of the volume is free: tokens are refused before signatures are", a.cfg.Policy.TSAReservePercent)
	}
	return nil
}

// exportPublic writes what others need to check us: anchors, units, the log's key. Nothing secret.
func (a *Appliance) exportPublic() error {
	id := a.identity
	cert := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	files := map[string][]byte{
		"ca.pem":     cert(id.CAs[string(hsm.SM2)]),
		"ca-rsa.pem": cert(id.CAs[string(hsm.RSA2048)]),
		"log.pem":    pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: id.LogKey}),
	}
	for alg, name := range map[hsm.Algorithm]string{hsm.SM2: "crl-sm2.crl", hsm.RSA2048: "crl-rsa.crl"} {
		if l := a.directory.CRL(string(alg)); l != nil {
			files[name] = l.DER
		}
	}
	if pair, _ := a.peers.current(); pair != nil {
		files["peer-log.pem"] = pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pair.LogKey})
	}
	for name, certs := range a.publicCertificates() {
		files[name] = pki.EncodeCertificatePEMs(certs...)
	}
	name := a.trustAnchorsFile()
	if anchors := a.publicAnchors(); len(anchors) > 0 {
		files[filepath.Base(name)] = pki.EncodeCertificatePEMs(anchors...)
	} else if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for name, data := range files {
		if err := writeFile(filepath.Join(a.dir, name), data, 0o644); err != nil {
			return err
		}
	}
	return nil
}
