package softtoken_test

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/emmansun/gmsm/sm3"
	"github.com/miekg/pkcs11"
	"yinjian/hsm/softtoken"
)

const (
	userLow, userFinal, userLocked = 0x10000, 0x20000, 0x40000
	soLow, soLocked                = 0x100000, 0x400000
)

func flags(t testing.TB, p *pkcs11.Ctx, mask uint) uint {
	t.Helper()
	info, err := p.GetTokenInfo(0)
	must(t, err)
	return info.Flags & mask
}

// TestPINLockout enters ten wrong PINs, the daemon being killed between, and has the officer give a new one.
func TestPINLockout(t *testing.T) {
	t.Parallel()
	m := newFolder(t)
	m.startProcess(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	pub, _ := generateSM2(t, p, s, "k")
	key := sm2Public(t, p, s, pub)
	must(t, p.Logout(s))
	const all = userLow | userFinal | userLocked
	wantFlags := func(when string, want uint) {
		t.Helper()
		if got := flags(t, p, all); got != want {
			t.Errorf("%s: PIN flags %#x, want %#x", when, got, want)
		}
	}
	wantFlags("before", 0)
	for range 3 {
		wantRV(t, "wrong PIN", p.Login(s, pkcs11.CKU_USER, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	}
	wantFlags("after 3 wrong PINs", userLow)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	must(t, p.Logout(s))
	wantFlags("after the right PIN", 0)
	for i := range 9 {
		// C_SetPIN and any form of PIN count as C_Login does.
		if i%3 == 0 {
			wantRV(t, "C_SetPIN with a wrong PIN", p.SetPIN(s, "wrong", "new-pin"), pkcs11.CKR_PIN_INCORRECT)
		} else {
			wantRV(t, "wrong PIN", p.Login(s, pkcs11.CKU_USER, strings.Repeat("x", i*40)), pkcs11.CKR_PIN_INCORRECT)
		}
		if i == 4 {
			m.kill(t)
			m.startProcess(t)
			s = openRW(t, p, 0)
		}
	}
	wantFlags("after 9", userLow|userFinal)
	wantRV(t, "tenth wrong PIN", p.Login(s, pkcs11.CKU_USER, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	wantFlags("after 10", userLow|userLocked)
	wantRV(t, "right PIN when locked", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_PIN_LOCKED)
	m.kill(t)
	m.startProcess(t)
	s = openRW(t, p, 0)
	wantFlags("after a restart", userLow|userLocked)
	wantRV(t, "right PIN when locked, after a restart", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_PIN_LOCKED)

	must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
	wantRV(t, "new PIN of 3 bytes", p.InitPIN(s, "abc"), pkcs11.CKR_PIN_LEN_RANGE)
	wantRV(t, "new PIN of 65 bytes", p.InitPIN(s, strings.Repeat("x", 65)), pkcs11.CKR_PIN_LEN_RANGE)
	wantRV(t, "new PIN that is not UTF-8", p.InitPIN(s, "abcd\xff"), pkcs11.CKR_PIN_INVALID)
	must(t, p.InitPIN(s, "new-pin"))
	must(t, p.Logout(s))
	wantFlags("after C_InitPIN", 0)
	wantRV(t, "old PIN", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_PIN_INCORRECT)
	must(t, p.Login(s, pkcs11.CKU_USER, "new-pin"))
	// The user's keys are what they were.
	e := sm3.Sum(nil)
	sig := mustSign(t, p, s, mech(pkcs11.CKM_ECDSA, nil), findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k"), e[:])
	if !verifyRaw(key, e[:], sig) {
		t.Error("the key is another after C_InitPIN")
	}
	must(t, p.SetPIN(s, "new-pin", "newer-pin"))
	must(t, p.Logout(s))
	wantRV(t, "PIN before C_SetPIN", p.Login(s, pkcs11.CKU_USER, "new-pin"), pkcs11.CKR_PIN_INCORRECT)
	must(t, p.Login(s, pkcs11.CKU_USER, "newer-pin"))
}

func TestOfficerLockout(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	p := m.module(t)
	initToken(t, p, 0, "a")
	before := flags(t, p, ^uint(0))
	for range 5 {
		wantRV(t, "C_InitToken with a wrong PIN", p.InitToken(0, "wrong", "b"), pkcs11.CKR_PIN_INCORRECT)
	}
	s := openRW(t, p, 0)
	for range 5 {
		wantRV(t, "wrong PIN", p.Login(s, pkcs11.CKU_SO, "wrong"), pkcs11.CKR_PIN_INCORRECT)
	}
	wantRV(t, "right PIN when locked", p.Login(s, pkcs11.CKU_SO, soPIN), pkcs11.CKR_PIN_LOCKED)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN)) // the user is not touched
	must(t, p.CloseSession(s))
	wantRV(t, "C_InitToken when locked", p.InitToken(0, soPIN, "b"), pkcs11.CKR_PIN_LOCKED)
	if got := flags(t, p, ^uint(0)); got != before|soLow|soLocked {
		t.Errorf("flags = %#x, want %#x", got, before|soLow|soLocked)
	}
}

func TestUserPINNotInitialized(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	p := m.module(t)
	wantRV(t, "officer's PIN of 3 bytes", p.InitToken(0, "abc", "a"), pkcs11.CKR_PIN_LEN_RANGE)
	must(t, p.InitToken(0, soPIN, "a"))
	s := openRW(t, p, 0)
	wantRV(t, "C_Login", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_USER_PIN_NOT_INITIALIZED)
}

// TestNoFreeTry: while the counter cannot be made durable, no PIN is compared, be it right or wrong, and what the
// counter then says is never less than the tries there were.
func TestNoFreeTry(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"create", "write", "sync", "rename", "syncdir"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t)
			p := m.module(t)
			initToken(t, p, 0, "a")
			s := openRW(t, p, 0)
			m.server.FailWrites(func(at string) error {
				if at == step {
					return syscall.ENOSPC
				}
				return nil
			})
			wantRV(t, "right PIN, full disk", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_DEVICE_MEMORY)
			wantRV(t, "wrong PIN, full disk", p.Login(s, pkcs11.CKU_USER, "wrong"), pkcs11.CKR_DEVICE_MEMORY)
			if flags(t, p, userLow) == 0 {
				t.Error("the tries are forgotten")
			}
			m.server.FailWrites(nil)
			must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
			if flags(t, p, userLow) != 0 {
				t.Error("the counter is not reset")
			}
		})
	}
}

// TestDiskFull: a key that cannot be stored is CKR_DEVICE_MEMORY and leaves nothing, neither now nor after a restart.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"create", "write", "sync", "rename", "syncdir"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			m, p, s := loggedIn(t)
			m.server.FailWrites(func(at string) error {
				if at == step {
					return syscall.ENOSPC
				}
				return nil
			})
			_, _, err := p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil),
				[]*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true)}, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true)})
			wantRV(t, "C_GenerateKeyPair", err, pkcs11.CKR_DEVICE_MEMORY)
			// One half in the session, one on the token: the session's half goes too.
			_, _, err = p.GenerateKeyPair(s, mech(softtoken.CKMNeutralSM2KeyPairGen, nil), nil, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, true)})
			wantRV(t, "C_GenerateKeyPair of a divided pair", err, pkcs11.CKR_DEVICE_MEMORY)
			if n := len(find(t, p, s)); n != 0 {
				t.Errorf("%d ghost objects", n)
			}
			m.server.FailWrites(nil)
			must(t, p.Finalize())
			m.restart(t)
			must(t, p.Initialize())
			s = openRW(t, p, 0)
			must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
			if n := len(find(t, p, s)); n != 0 {
				t.Errorf("%d ghost objects after a restart", n)
			}
			generateSM2(t, p, s, "k")
		})
	}
}

// TestInitTokenStopped: an initialisation that fails at any step leaves the old token or the new one, and a folder
// that opens.
func TestInitTokenStopped(t *testing.T) {
	t.Parallel()
	for n := range 16 {
		m, p, s := loggedIn(t)
		generateSM2(t, p, s, "k")
		must(t, p.CloseSession(s))
		steps := 0
		m.server.FailWrites(func(string) error {
			if steps++; steps > n {
				return syscall.EIO
			}
			return nil
		})
		err := p.InitToken(0, soPIN, "new")
		m.server.FailWrites(nil)
		must(t, p.Finalize())
		m.restart(t)
		must(t, p.Initialize())
		info, ierr := p.GetTokenInfo(0)
		must(t, ierr)
		s = openRW(t, p, 0)
		switch info.Label {
		case "new":
			wantRV(t, "user's login after C_InitToken", p.Login(s, pkcs11.CKU_USER, userPIN), pkcs11.CKR_USER_PIN_NOT_INITIALIZED)
			if got := len(find(t, p, s)); got != 0 {
				t.Errorf("stopped at step %d: the new token has %d objects", n, got)
			}
			must(t, p.Login(s, pkcs11.CKU_SO, soPIN))
		case "test":
			if err == nil {
				t.Errorf("stopped at step %d: C_InitToken answered CKR_OK and the old token is there", n)
			}
			must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
			findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
		default:
			t.Errorf("stopped at step %d: label %q", n, info.Label)
		}
		p.Finalize()
		m.stop()
	}
}

func TestInitTokenAgain(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	generateSM2(t, p, s, "k")
	before, err := p.GetTokenInfo(0)
	must(t, err)
	must(t, p.CloseSession(s))
	must(t, p.InitToken(0, soPIN, "new"))
	after, err := p.GetTokenInfo(0)
	must(t, err)
	if after.SerialNumber == before.SerialNumber || after.Label != "new" || after.Flags&pkcs11.CKF_USER_PIN_INITIALIZED != 0 {
		t.Errorf("token after C_InitToken: %+v", after)
	}
	if dirs, _ := filepath.Glob(filepath.Join(m.dir, "slot-0", "*", "")); len(dirs) != 2 { // token.rec and one serial
		t.Errorf("the slot's folder holds %v", dirs)
	}
}

func TestWrongPassphrase(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.stop()
	must(t, os.WriteFile(m.passphrase, []byte("another passphrase"), 0o600))
	_, err := softtoken.Open(m.cfg)
	if !errors.Is(err, softtoken.ErrWrongPassphrase) || !strings.Contains(err.Error(), "wrong passphrase") {
		t.Errorf("Open = %v, want ErrWrongPassphrase", err)
	}
	for name, change := range map[string]func(){
		"shorter": func() { must(t, os.WriteFile(m.passphrase, []byte("1234567\n"), 0o600)) },
		"mode": func() {
			must(t, os.WriteFile(m.passphrase, []byte("correct horse battery\n"), 0o600))
			must(t, os.Chmod(m.passphrase, 0o640))
		},
		"absent": func() {},
		"folder": func() { must(t, os.Mkdir(m.passphrase, 0o700)) },
	} {
		must(t, os.RemoveAll(m.passphrase))
		change()
		if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), "passphrase file") {
			t.Errorf("%s: Open = %v", name, err)
		}
	}
	must(t, os.RemoveAll(m.passphrase))
	must(t, os.WriteFile(m.passphrase, []byte("correct horse battery"), 0o400)) // the line break does not count
	m.start(t)
}

func TestFolder(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second Open = %v", err)
	}
	if info, err := os.Stat(m.socket); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	m.stop()
	if _, err := os.Lstat(m.socket); err == nil {
		t.Error("the socket is there after a clean stop")
	}
	must(t, os.Chmod(m.dir, 0o750))
	if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), "mode 0750") {
		t.Errorf("Open of a folder that is open to others = %v", err)
	}
	must(t, os.Chmod(m.dir, 0o700))
	must(t, os.WriteFile(m.socket, nil, 0o600))
	if _, err := softtoken.Open(m.cfg); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("Open with a file in the socket's place = %v", err)
	}
	must(t, os.Remove(m.socket))
	long := m.cfg
	long.SocketPath = filepath.Join(m.dir, strings.Repeat("x", 100))
	if _, err := softtoken.Open(long); err == nil || !strings.Contains(err.Error(), "107 bytes") {
		t.Errorf("Open with a long socket path = %v", err)
	}
	s, err := softtoken.Open(m.cfg)
	must(t, err)
	must(t, s.Close())
	if err := s.Serve(t.Context()); err == nil {
		t.Error("Serve after Close = nil")
	}
	m.start(t) // everything was given back
}

// TestTampering changes, moves and removes what is at rest. The daemon refuses to start and says which file it is.
func TestTampering(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	p := m.module(t)
	for slot := range uint(2) {
		initToken(t, p, slot, "a")
		s := openRW(t, p, slot)
		must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
		generateSM2(t, p, s, "k")
		generateSM2(t, p, s, "l")
	}
	must(t, p.Finalize())
	m.stop()
	one := func(pattern string) string {
		all, err := filepath.Glob(filepath.Join(m.dir, pattern))
		if err != nil || len(all) == 0 {
			t.Fatalf("no %s", pattern)
		}
		return all[0]
	}
	objects, err := filepath.Glob(filepath.Join(m.dir, "slot-0", "*", "*.obj"))
	if err != nil || len(objects) != 2 {
		t.Fatalf("objects: %v, %v", objects, err)
	}
	flip := func(path string, at int) func() {
		return func() {
			b, err := os.ReadFile(path)
			must(t, err)
			b[(at+len(b))%len(b)] ^= 1
			must(t, os.WriteFile(path, b, 0o600))
		}
	}
	copyTo := func(from, to string) func() {
		return func() {
			b, err := os.ReadFile(from)
			must(t, err)
			must(t, os.WriteFile(to, b, 0o600))
		}
	}
	for name, row := range map[string]struct {
		named  string
		change func()
	}{
		"object changed":             {objects[0], flip(objects[0], -1)},
		"object's nonce changed":     {objects[0], flip(objects[0], 7)},
		"object's version changed":   {objects[0], flip(objects[0], 4)},
		"object cut short":           {objects[0], func() { must(t, os.Truncate(objects[0], 20)) }},
		"object empty":               {objects[0], func() { must(t, os.Truncate(objects[0], 0)) }},
		"object in another's place":  {objects[1], copyTo(objects[0], objects[1])},
		"object in another slot":     {filepath.Base(objects[0]), copyTo(objects[0], filepath.Join(filepath.Dir(one("slot-1/*/*.obj")), filepath.Base(objects[0])))},
		"token changed":              {"slot-0/token.rec", flip(one("slot-0/token.rec"), 40)},
		"token of another slot":      {"slot-1/token.rec", copyTo(one("slot-0/token.rec"), one("slot-1/token.rec"))},
		"token removed":              {"slot-0/token.rec", func() { must(t, os.Remove(one("slot-0/token.rec"))) }},
		"PIN counter changed":        {"pins.rec", flip(one("slot-0/*/pins.rec"), -3)},
		"PIN counter removed":        {"pins.rec", func() { must(t, os.Remove(one("slot-0/*/pins.rec"))) }},
		"PIN counter of other slot":  {"pins.rec", copyTo(one("slot-1/*/pins.rec"), one("slot-0/*/pins.rec"))},
		"object in the counter's":    {"pins.rec", copyTo(objects[0], one("slot-0/*/pins.rec"))},
		"file of someone else's":     {"README", func() { must(t, os.WriteFile(filepath.Join(filepath.Dir(objects[0]), "README"), nil, 0o600)) }},
		"store key changed":          {"store.rec", flip(one("store.rec"), -1)},
		"store's iterations changed": {"store.rec", flip(one("store.rec"), 9)},
		"store's salt changed":       {"store.rec", flip(one("store.rec"), 15)},
		"store removed":              {"store.rec", func() { must(t, os.Remove(one("store.rec"))) }},
	} {
		saved := snapshot(t, m.dir)
		row.change()
		s, err := softtoken.Open(m.cfg)
		if err == nil {
			s.Close()
		}
		if err == nil || !strings.Contains(err.Error(), row.named) {
			t.Errorf("%s: Open = %v, want a refusal that names %s", name, err, row.named)
		}
		saved.restore(t)
	}
	m.start(t)
	must(t, p.Initialize())
	s := openRW(t, p, 0)
	must(t, p.Login(s, pkcs11.CKU_USER, userPIN))
	findOne(t, p, s, pkcs11.CKO_PRIVATE_KEY, "k")
}

// TestIterations: a daemon outside of tests stretches secrets at least 200,000 times, and the record says how often.
func TestIterations(t *testing.T) {
	t.Parallel()
	if softtoken.DefaultPBKDF2Iterations < 200_000 {
		t.Errorf("%d iterations", softtoken.DefaultPBKDF2Iterations)
	}
	m := newMachine(t)
	b, err := os.ReadFile(filepath.Join(m.dir, "store.rec"))
	must(t, err)
	if got := binary.BigEndian.Uint32(b[6:]); int(got) != softtoken.PBKDF2Iterations() {
		t.Errorf("store.rec says %d iterations, want %d", got, softtoken.PBKDF2Iterations())
	}
}

// TestSealed looks for what must not lie open in the folder.
func TestSealed(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	generateSM2(t, p, s, "a-label-to-look-for")
	must(t, p.Finalize())
	m.stop()
	for path, b := range snapshot(t, m.dir).files {
		for _, text := range []string{"a-label-to-look-for", userPIN, soPIN, "correct horse"} {
			if strings.Contains(string(b), text) {
				t.Errorf("%s shows %q", path, text)
			}
		}
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
}

// A folderState is a folder's files, to put back.
type folderState struct {
	dir   string
	files map[string][]byte
}

func snapshot(t testing.TB, dir string) folderState {
	t.Helper()
	f := folderState{dir: dir, files: map[string][]byte{}}
	must(t, filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err != nil || !info.Mode().IsRegular() {
			return err
		}
		f.files[path], err = os.ReadFile(path)
		return err
	}))
	return f
}

func (f folderState) restore(t testing.TB) {
	t.Helper()
	for path := range snapshot(t, f.dir).files {
		if _, ok := f.files[path]; !ok {
			must(t, os.Remove(path))
		}
	}
	for path, b := range f.files {
		must(t, os.WriteFile(path, b, 0o600))
	}
}

// TestWipedAtLogout: private objects are open in memory while an application is logged in, and no longer.
func TestWipedAtLogout(t *testing.T) {
	t.Parallel()
	m, p, s := loggedIn(t)
	generateSM2(t, p, s, "k")
	generateRSA(t, p, s, "r")
	want := func(when string, objects int) {
		t.Helper()
		if n, keyed := m.server.OpenPrivate(0); n != objects || keyed != (objects > 0) {
			t.Errorf("%s: %d private objects are open, their key in memory: %v; want %d", when, n, keyed, objects)
		}
	}
	want("logged in", 2)
	q := m.module(t)
	qs := openRW(t, q, 0)
	must(t, q.Login(qs, pkcs11.CKU_USER, userPIN))
	must(t, p.Logout(s))
	want("one application logged out", 2)
	secrets := m.server.Secrets(0)
	if len(secrets) < 4 { // d, and d, p and q
		t.Fatalf("%d numbers", len(secrets))
	}
	must(t, q.Finalize()) // without a logout
	want("all logged out", 0)
	for i, v := range secrets {
		if v.Sign() != 0 {
			for _, word := range v.Bits() {
				if word != 0 {
					t.Errorf("number %d of the private keys is still in memory", i)
					break
				}
			}
		}
	}

	// A process that dies is logged out by its end.
	c := dial(t, m, "0123456789abcdef")
	for _, frame := range []string{
		"\x00\x00\x00\x14\x00\x00\x00\x0a" + strings.Repeat("\x00", 8) + "\x00\x00\x00\x00\x00\x00\x00\x06",
		"\x00\x00\x00\x18\x00\x00\x00\x12" + "\x00\x00\x00\x00\x00\x00\x00\x01" + "\x00\x00\x00\x08" + userPIN,
	} {
		_, err := c.Write([]byte(frame))
		must(t, err)
		if rv := readReply(t, c); rv != 0 {
			t.Fatalf("CKR %#x", rv)
		}
	}
	want("logged in by hand", 2)
	must(t, c.Close())
	for i := 0; ; i++ {
		if n, _ := m.server.OpenPrivate(0); n == 0 {
			break
		}
		if i == 2000 {
			t.Fatal("the keys are open two seconds after the peer's end")
		}
		time.Sleep(time.Millisecond)
	}
	m.stop()
	want("stopped", 0)
}
