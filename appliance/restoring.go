package appliance

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/sirupsen/logrus"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/problem"
	"yinjian/ntp"
	"yinjian/ntp/sysclock"
)

// A RestoreRequest is what a folder that waits for a backup is to be restored from.
type RestoreRequest struct {
	Files          []string // paths
	Shares         [][]byte // as their files have them; wiped by who asked
	LogKey         []byte   // PEM; nil: the backup's own
	WithoutReceipt bool
	Persons        []string
	Answers        []byte // settings and secrets over those of the folder's answers; TOML
	From           string // the address of who asked
	Refused        int    // how many wrong tokens were shown before
	Progress       func(read, total int64)
}

// RestoreKeeps are what stays in the folder of a running process that is restored: the process's own, its answers, what a
// file system makes.
var RestoreKeeps = []string{"run", AnswersFile, "lost+found"}

// RestoreFiles is where a backup's files lie until they are restored.
func RestoreFiles(dir string) string { return filepath.Join(dir, "run", "restore") }

// EmptyForRestore takes away what an unfinished restore has left in a folder, its mark last.
func EmptyForRestore(dir string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != RestoreUnfinished && !slices.Contains(RestoreKeeps, e.Name()) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err == nil {
		err = os.RemoveAll(RestoreFiles(dir))
	}
	if err == nil {
		err = os.Remove(filepath.Join(dir, RestoreUnfinished))
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return err
}

// A restoring is the door of an empty folder that waits for a backup (api.Restorer). Certificate and token are new at each
// start of the process, and on no disk.
type restoring struct {
	h           *house
	ctx         context.Context // the process's: a restore outlives the request that began it
	log         logrus.FieldLogger
	token       string
	fingerprint string
	done        chan struct{} // closed when the folder is an appliance's

	mu      sync.Mutex // guards what follows
	address string     // where it listens; "" before
	now     wire.RestoreState
	taking  bool // a file comes
	refused int  // wrong tokens
	told    bool // somebody has been told that it is restored
}

// tokenText writes 100 bits so that they can be read off a screen: without 0, 1, 8 and 9.
func tokenText() string {
	var b [13]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	s := base32.StdEncoding.EncodeToString(b[:])[:20]
	return s[:5] + "-" + s[5:10] + "-" + s[10:15] + "-" + s[15:]
}

// plainToken is a token as it was meant: the case and the hyphens are for the eye.
func plainToken(s string) string {
	return strings.ToUpper(strings.NewReplacer("-", "", " ", "").Replace(s))
}

// ownCertificate is one that nobody has signed, for a key that lives as long as the process. Whoever believes it has read its
// fingerprint from the console, so that its dates say nothing: the machine's clock may be anywhere.
func ownCertificate() (*tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "yinjian restore"},
		NotBefore: time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC), NotAfter: time.Date(2099, 12, 31, 0, 0, 0, 0, time.UTC),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// machineClock is the machine's own time, for TLS tickets.
type machineClock struct{ sys *sysclock.Clock }

func (c machineClock) Now() ntp.Reading { return ntp.Reading{Time: c.sys.Realtime().UTC()} }

const (
	restoreConnections = 32
	restoreDrain       = 30 * time.Second
	restoreTold        = 30 * time.Second // to ask what came of a restore
)

// awaitRestore waits at an address until the folder has been restored. It fails when ctx ends.
func (h *house) awaitRestore(ctx context.Context, address string) error {
	if err := os.RemoveAll(RestoreFiles(h.o.Dir)); err != nil { // of a process before; what it was told is forgotten, too
		return err
	}
	cert, err := ownCertificate()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(cert.Certificate[0])
	r := &restoring{
		h: h, ctx: ctx, log: h.log, token: tokenText(), fingerprint: hex.EncodeToString(sum[:]), done: make(chan struct{}),
		now: wire.RestoreState{State: wire.RestoreWaits, Files: []wire.RestoreFile{}},
	}
	h.mu.Lock()
	h.restoring = r
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.restoring = nil
	}()
	var ln net.Listener
	for said := ""; ln == nil; { // the address may come with the network
		ln, err = api.ListenTLS(address, func() *tls.Certificate { return cert }, machineClock{h.sys}, false, nil, restoreConnections)
		if err == nil {
			break
		}
		if err.Error() != said {
			said = err.Error()
			h.log.WithError(err).Error("cannot wait for a backup yet")
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r.mu.Lock()
	r.address = ln.Addr().String()
	r.mu.Unlock()
	// The token stands on the console (docs/states.md), not in the log.
	h.log.WithFields(logrus.Fields{"address": r.address, "fingerprint": r.fingerprint}).Info("the folder waits for a backup (yinjian restore --to)")
	serving, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	srv := api.NewRestoreServer(r, h.log, Version)
	go func() { ended <- api.Serve(serving, srv, ln, restoreDrain) }()
	select {
	case <-r.done:
	case err := <-ended:
		return errors.Join(err, ctx.Err())
	case <-ctx.Done():
		<-ended
		return ctx.Err()
	}
	// Who waits for the outcome may have it; then nobody answers here again.
	for until := h.sys.Monotonic() + restoreTold; h.sys.Monotonic() < until && ctx.Err() == nil; time.Sleep(50 * time.Millisecond) {
		r.mu.Lock()
		told := r.told
		r.mu.Unlock()
		if told {
			break
		}
	}
	stop()
	if err := <-ended; err != nil {
		h.log.WithError(err).Warning("the door of the restore did not close in order")
	}
	return ctx.Err()
}

// Admits satisfies api.Restorer.
func (r *restoring) Admits(token string, from netip.Addr) bool {
	if subtle.ConstantTimeCompare([]byte(plainToken(token)), []byte(plainToken(r.token))) == 1 {
		return true
	}
	r.mu.Lock()
	r.refused++
	n := r.refused
	r.mu.Unlock()
	r.log.WithFields(logrus.Fields{"from": from.String(), "so_far": n}).Warning("a wrong token was shown to the restore")
	return false
}

// State satisfies api.Restorer.
func (r *restoring) State() wire.RestoreState {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.now
	s.Files = slices.Clone(s.Files)
	if s.State == wire.RestoreDone {
		r.told = true
	}
	return s
}

var (
	errRestoreRuns = problem.New(problem.WrongState, "正在恢复，或已恢复 (a restore is under way, or done)", "等它结束 (wait for its end)")
	errRestoreFile = problem.New(problem.WrongState, "另一个文件正在传送 (another file is being sent)", "等它传完 (wait for its end)")
)

// Take satisfies api.Restorer. The files lie beside what is restored of them, which needs as much room again.
func (r *restoring) Take(ctx context.Context, name string, size int64, in io.Reader) (wire.RestoreFile, error) {
	none := wire.RestoreFile{}
	r.mu.Lock()
	switch {
	case r.now.State == wire.RestoreRuns || r.now.State == wire.RestoreDone:
		r.mu.Unlock()
		return none, errRestoreRuns
	case r.taking:
		r.mu.Unlock()
		return none, errRestoreFile
	}
	r.taking = true
	r.now.Files = slices.DeleteFunc(r.now.Files, func(f wire.RestoreFile) bool { return f.Name == name })
	var waiting int64
	for _, f := range r.now.Files {
		waiting += f.Size
	}
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.taking = false
	}()
	folder := RestoreFiles(r.h.o.Dir)
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return none, err
	}
	path := filepath.Join(folder, name)
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return none, err
	}
	var disk syscall.Statfs_t
	if err := syscall.Statfs(folder, &disk); err != nil {
		return none, err
	}
	if free := int64(disk.Bavail) * int64(disk.Bsize); size > free || waiting > free-size || size > free-size-waiting {
		return none, problem.New(problem.DiskReserve, fmt.Sprintf("磁盘只剩 %d MiB：备份文件与恢复出来的各占一份，放不下 (%d MiB are free, which hold neither this file nor what is restored of it)", free>>20, free>>20), "换更大的硬盘重装 (take a larger disk)")
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return none, err
	}
	digest := sm3.New()
	n, err := io.Copy(io.MultiWriter(f, digest), in)
	if err == nil && n != size {
		err = io.ErrUnexpectedEOF
	}
	if err = errors.Join(err, f.Close()); err != nil { // a power cut forgets the files: they need not be on the disk
		return none, errors.Join(err, os.Remove(path))
	}
	got := wire.RestoreFile{Name: name, Size: size, SM3: hex.EncodeToString(digest.Sum(nil))}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now.Files = append(r.now.Files, got)
	return got, nil
}

// Begin satisfies api.Restorer.
func (r *restoring) Begin(req api.BeginRestore, from netip.Addr) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.now.State == wire.RestoreRuns || r.now.State == wire.RestoreDone:
		return errRestoreRuns
	case r.taking:
		return errRestoreFile
	}
	do := RestoreRequest{
		Shares: req.Shares, LogKey: req.LogKey, WithoutReceipt: req.WithoutReceipt, Persons: req.Persons, Answers: req.Answers, From: from.String(), Refused: r.refused,
		Progress: func(read, total int64) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.now.Bytes, r.now.Total = read, total
		},
	}
	for _, name := range req.Files {
		if !slices.ContainsFunc(r.now.Files, func(f wire.RestoreFile) bool { return f.Name == name }) {
			return problem.Invalid("files", "%s 没有传来 (was not sent)", name)
		}
		do.Files = append(do.Files, filepath.Join(RestoreFiles(r.h.o.Dir), name))
	}
	r.now.State, r.now.Failure, r.now.Bytes, r.now.Total = wire.RestoreRuns, "", 0, 0
	go r.run(do)
	return nil
}

// run restores, and says what came of it. The files stay for another try: a secret that is missing does not have tens of
// gigabytes sent again.
func (r *restoring) run(do RestoreRequest) {
	report, err := r.h.o.Restore(r.ctx, do)
	for _, s := range do.Shares {
		clear(s)
	}
	clear(do.Answers)
	if err == nil {
		if err := os.RemoveAll(RestoreFiles(r.h.o.Dir)); err != nil {
			r.log.WithError(err).Warning("the backup's files could not be removed; they are sealed, and take room")
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.log.WithError(err).Error("the restore was refused")
		r.now.State, r.now.Failure = wire.RestoreFails, strings.ReplaceAll(err.Error(), RestoreFiles(r.h.o.Dir)+string(filepath.Separator), "")
		return
	}
	r.log.WithField("from", do.From).Info("the folder was restored from a backup")
	r.now.State, r.now.Report = wire.RestoreDone, bytes.TrimSpace(report)
	close(r.done)
}

// A restoreShown is what the local socket says of it: what an engineer has to type, read from the console of the machine
// itself, and how far it is.
type restoreShown struct {
	Address     string `json:"address,omitempty"`
	Fingerprint string `json:"fingerprint"`
	Token       string `json:"token"`
	State       string `json:"state"`
	Files       int    `json:"files"`
	Percent     int64  `json:"percent"`
	Refused     int    `json:"refused"` // wrong tokens
	Failure     string `json:"failure,omitempty"`
}

func (r *restoring) shown() *restoreShown {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := &restoreShown{Address: r.address, Fingerprint: r.fingerprint, Token: r.token, State: r.now.State, Files: len(r.now.Files), Refused: r.refused, Failure: r.now.Failure}
	if r.now.Total > 0 {
		s.Percent = 100 * r.now.Bytes / r.now.Total
	}
	return s
}
