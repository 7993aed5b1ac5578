package softtoken

import (
	"cmp"
	"crypto/rand"
	"encoding/binary"
	"net"
	"slices"
	"sync"
)

// An application is one C_Initialize of one process. Login state and handles are its own.
type application struct {
	id    [16]byte
	pid   int32
	uid   uint32
	conns int // guarded by Server.mu; the application ends when it reaches zero
	slots []*appSlot
}

// An appSlot is what one application has with one token.
type appSlot struct {
	token *token

	// mu guards what follows. It is taken after token.pinMu and before token.mu.
	mu         sync.RWMutex
	sessions   map[*session]struct{}
	readOnly   int // sessions without CKF_RW_SESSION
	role       role
	tokenKey   []byte // while the security officer is logged in, to wrap it for a new user PIN
	generation uint64 // counts logouts
	handles    map[uint64]*object
	numbers    map[*object]uint64
	next       uint64               // last handle given; begins at random, so that another application's handles mean nothing here
	objects    map[*object]struct{} // session objects
}

func newApplication(id [16]byte, pid int32, uid uint32, tokens []*token) *application {
	a := &application{id: id, pid: pid, uid: uid}
	for _, t := range tokens {
		var seed [8]byte
		rand.Read(seed[:])
		a.slots = append(a.slots, &appSlot{
			token:    t,
			sessions: map[*session]struct{}{},
			handles:  map[uint64]*object{},
			numbers:  map[*object]uint64{},
			objects:  map[*object]struct{}{},
			next:     binary.BigEndian.Uint64(seed[:]) >> 2,
		})
	}
	return a
}

// slot answers the application's side of a slot.
func (a *application) slot(id uint64) (*appSlot, rv) {
	if id >= uint64(len(a.slots)) {
		return nil, ckrSlotIDInvalid
	}
	return a.slots[id], ckrOK
}

// close ends all sessions with all slots.
func (a *application) close() {
	for _, s := range a.slots {
		s.closeAll()
	}
}

// A session is one C_OpenSession. It lives on one connection.
type session struct {
	slot  *appSlot
	flags uint64
	nc    net.Conn

	// mu is held by the connection's goroutine while it serves a request, and by whoever closes the session. It
	// guards what follows and is taken before every other lock.
	mu     sync.Mutex
	closed bool
	sign   *signature
	verify *signature
	digest *digest
	find   *search

	encrypt *ciphering
	decrypt *ciphering
}

func (s *session) readWrite() bool { return s.flags&ckfRWSession != 0 }

// open makes a session (C_OpenSession); there are limit at most.
func (a *appSlot) open(flags uint64, nc net.Conn, limit int) (*session, rv) {
	if flags&ckfSerialSession == 0 {
		return nil, ckrSessionParallel
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	rw := flags&ckfRWSession != 0
	if !rw && a.role == officer {
		return nil, ckrSessionReadWriteSOExists
	}
	if len(a.sessions) >= limit {
		return nil, ckrSessionCount
	}
	t := a.token
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.initialising:
		return nil, ckrFunctionFailed
	case t.rec == nil:
		return nil, ckrTokenNotRecognized
	}
	s := &session{slot: a, flags: flags, nc: nc}
	a.sessions[s] = struct{}{}
	t.sessions++
	if !rw {
		a.readOnly++
	}
	return s, ckrOK
}

// close ends the session: its operations, its objects and, with an application's last session, the login.
func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeLocked()
}

func (s *session) closeLocked() {
	if s.closed {
		return
	}
	s.closed = true
	s.sign, s.verify, s.digest, s.find, s.encrypt, s.decrypt = nil, nil, nil, nil, nil, nil
	a := s.slot
	a.mu.Lock()
	defer a.mu.Unlock()
	for o := range a.objects {
		if o.owner == s {
			a.drop(o)
		}
	}
	delete(a.sessions, s)
	if !s.readWrite() {
		a.readOnly--
	}
	if len(a.sessions) == 0 {
		a.logoutLocked()
	}
	a.token.mu.Lock()
	a.token.sessions--
	a.token.mu.Unlock()
}

// closeAll ends the application's sessions with this token and hangs up on their connections. A request that is being
// served is served to its end first.
func (a *appSlot) closeAll() {
	a.mu.RLock()
	var all []*session
	for s := range a.sessions {
		all = append(all, s)
	}
	a.mu.RUnlock()
	for _, s := range all {
		s.close()
		s.nc.Close()
	}
}

// drop forgets a session object and wipes its key; the caller holds mu.
func (a *appSlot) drop(o *object) {
	delete(a.objects, o)
	a.forget(o)
	o.discard()
}

// forget takes an object's handle away; the caller holds mu.
func (a *appSlot) forget(o *object) {
	if h, ok := a.numbers[o]; ok {
		delete(a.numbers, o)
		delete(a.handles, h)
	}
}

// mayTouch says whether an object may be destroyed, copied or otherwise changed: private ones by the user alone.
func (v view) mayTouch(o *object) bool { return !o.private() || v.role == user }

// login is C_Login. While someone is logged in, a PIN is not even looked at.
func (a *appSlot) login(r role, pin []byte) rv {
	t := a.token
	t.pinMu.Lock()
	defer t.pinMu.Unlock()
	a.mu.RLock()
	code := a.mayLogin(r)
	a.mu.RUnlock()
	if code != ckrOK {
		return code
	}
	key, code := t.tryPIN(r, pin)
	if code != ckrOK {
		return code
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	code = a.mayLogin(r) // a read-only session may have been opened meanwhile
	if code == ckrOK {
		if code = t.unlock(key); code == ckrOK {
			t.openUses()
		}
	}
	if code != ckrOK {
		clear(key)
		return code
	}
	a.role = r
	if r == officer {
		a.tokenKey = key
	} else {
		clear(key)
	}
	return ckrOK
}

func (a *appSlot) mayLogin(r role) rv {
	switch {
	case a.role == r:
		return ckrUserAlreadyLoggedIn
	case a.role != nobody:
		return ckrUserAnotherAlreadyLoggedIn
	case r == officer && a.readOnly > 0:
		return ckrSessionReadOnlyExists
	}
	return ckrOK
}

func (a *appSlot) logout() rv {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.role == nobody {
		return ckrUserNotLoggedIn
	}
	a.logoutLocked()
	return ckrOK
}

// logoutLocked makes every handle of a private object, and every operation with one, invalid (base §5.6, C_Logout).
func (a *appSlot) logoutLocked() {
	if a.role == nobody {
		return
	}
	a.role = nobody
	a.generation++
	clear(a.tokenKey)
	a.tokenKey = nil
	for o := range a.numbers {
		if o.private() || o.dead.Load() {
			a.forget(o)
		}
	}
	for o := range a.objects {
		if o.private() {
			a.drop(o)
		}
	}
	a.token.lock()
}

// initPIN is C_InitPIN: the security officer gives the user a PIN. The user's objects stay.
func (a *appSlot) initPIN(pin []byte) rv {
	t := a.token
	t.pinMu.Lock()
	defer t.pinMu.Unlock()
	a.mu.RLock()
	key := slices.Clone(a.tokenKey)
	a.mu.RUnlock()
	defer clear(key)
	if key == nil {
		return ckrUserNotLoggedIn
	}
	if code := checkNewPIN(pin); code != ckrOK {
		return code
	}
	return t.setPIN(user, pin, key)
}

// changePIN is C_SetPIN: of the security officer while that one is logged in, otherwise of the user.
func (a *appSlot) changePIN(old, fresh []byte) rv {
	t := a.token
	t.pinMu.Lock()
	defer t.pinMu.Unlock()
	a.mu.RLock()
	r := a.role
	a.mu.RUnlock()
	if r == nobody {
		r = user
	}
	if code := checkNewPIN(fresh); code != ckrOK {
		return code
	}
	key, code := t.tryPIN(r, old)
	if code != ckrOK {
		return code
	}
	defer clear(key)
	return t.setPIN(r, fresh, key)
}

// A view is what an application may see at a moment.
type view struct {
	role       role
	generation uint64
}

func (a *appSlot) view() view {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return view{a.role, a.generation}
}

// object answers the object of a handle, nil when the handle means nothing to this application now.
func (a *appSlot) object(h uint64) (*object, view) {
	a.mu.RLock()
	defer a.mu.RUnlock()
	o := a.handles[h]
	if o != nil && o.dead.Load() {
		o = nil
	}
	return o, view{a.role, a.generation}
}

// handlesOf gives handles to objects that were found in view v. What is private and was seen before a logout is left
// out. Objects keep their handle while they are visible.
func (a *appSlot) handlesOf(v view, objects ...*object) []uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]uint64, 0, len(objects))
	for _, o := range objects {
		if o.dead.Load() || o.private() && v.generation != a.generation {
			continue
		}
		h, ok := a.numbers[o]
		if !ok {
			a.next++
			h = a.next
			a.numbers[o], a.handles[h] = h, o
		}
		out = append(out, h)
	}
	return out
}

// search answers the objects that the application may see and that match, in order of appearance. Of private objects
// the security officer sees the keys that wrap, since it is for him to say whether they are trusted.
func (a *appSlot) search(templ []attribute) ([]*object, view) {
	a.mu.RLock()
	v := view{a.role, a.generation}
	var out []*object
	for o := range a.objects {
		out = append(out, o)
	}
	a.mu.RUnlock()
	if i := slices.IndexFunc(templ, func(t attribute) bool { return t.typ == ckaLabel }); i >= 0 {
		out = append(out, a.token.labelled(string(templ[i].value), v.role != nobody)...)
	} else {
		out = append(out, a.token.objects(v.role != nobody)...)
	}
	out = slices.DeleteFunc(out, func(o *object) bool {
		attrs := o.attributes()
		return !attrs.matches(templ) || v.role == officer && attrs.bool(ckaPrivate) && !attrs.bool(ckaWrap)
	})
	slices.SortFunc(out, func(x, y *object) int { return cmp.Compare(x.seq, y.seq) })
	return out, v
}

// addSession makes objects the session's own.
func (a *appSlot) addSession(s *session, v view, objects ...*object) rv {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.objects)+len(objects) > maxSessionObjects {
		return ckrDeviceMemory
	}
	for _, o := range objects {
		if o.private() && v.generation != a.generation {
			return ckrUserNotLoggedIn
		}
	}
	for _, o := range objects {
		o.owner = s
		a.objects[o] = struct{}{}
	}
	return ckrOK
}
