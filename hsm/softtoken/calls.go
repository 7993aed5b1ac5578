package softtoken

import (
	"crypto/rand"
	"os"
	"time"
)

// A callSpec is one row of the protocol: a PKCS#11 function as it crosses the wire.
type callSpec struct {
	name    string
	shape   string // of the arguments, see the package's documentation
	session bool   // needs the connection's session
	secret  bool   // carries a PIN: the frame is wiped
	serve   func(p *peer, r *request, w *builder) rv
}

// calls are numbered as PKCS#11 orders its functions, C_Initialize being 1 (as p11-kit's protocol does). 100 is ours.
var calls = [128]*callSpec{
	2:   {name: "C_Finalize", serve: serveFinalize},
	4:   {name: "C_GetSlotList", serve: serveGetSlotList},
	5:   {name: "C_GetSlotInfo", shape: "q", serve: serveGetSlotInfo},
	6:   {name: "C_GetTokenInfo", shape: "q", serve: serveGetTokenInfo},
	7:   {name: "C_GetMechanismList", shape: "q", serve: serveGetMechanismList},
	8:   {name: "C_GetMechanismInfo", shape: "qq", serve: serveGetMechanismInfo},
	9:   {name: "C_InitToken", shape: "qss", secret: true, serve: serveInitToken},
	10:  {name: "C_OpenSession", shape: "qq", serve: serveOpenSession},
	11:  {name: "C_CloseSession", session: true, serve: serveCloseSession},
	12:  {name: "C_CloseAllSessions", shape: "q", serve: serveCloseAllSessions},
	13:  {name: "C_GetSessionInfo", session: true, serve: serveGetSessionInfo},
	14:  {name: "C_InitPIN", shape: "s", session: true, secret: true, serve: serveInitPIN},
	15:  {name: "C_SetPIN", shape: "ss", session: true, secret: true, serve: serveSetPIN},
	18:  {name: "C_Login", shape: "qs", session: true, secret: true, serve: serveLogin},
	19:  {name: "C_Logout", session: true, serve: serveLogout},
	20:  {name: "C_CreateObject", shape: "A", session: true, serve: serveCreateObject},
	21:  {name: "C_CopyObject", shape: "qA", session: true, serve: serveCopyObject},
	22:  {name: "C_DestroyObject", shape: "q", session: true, serve: serveDestroyObject},
	23:  {name: "C_GetObjectSize", shape: "q", session: true, serve: serveGetObjectSize},
	24:  {name: "C_GetAttributeValue", shape: "qT", session: true, serve: serveGetAttributeValue},
	25:  {name: "C_SetAttributeValue", shape: "qA", session: true, serve: serveSetAttributeValue},
	26:  {name: "C_FindObjectsInit", shape: "A", session: true, serve: serveFindObjectsInit},
	27:  {name: "C_FindObjects", shape: "q", session: true, serve: serveFindObjects},
	28:  {name: "C_FindObjectsFinal", session: true, serve: serveFindObjectsFinal},
	29:  {name: "C_EncryptInit", shape: "Mq", session: true, serve: serveEncryptInit},
	30:  {name: "C_Encrypt", shape: "sq", session: true, serve: serveEncrypt},
	31:  {name: "C_EncryptUpdate", shape: "sq", session: true, serve: serveEncryptUpdate},
	32:  {name: "C_EncryptFinal", shape: "q", session: true, serve: serveEncryptFinal},
	33:  {name: "C_DecryptInit", shape: "Mq", session: true, serve: serveDecryptInit},
	34:  {name: "C_Decrypt", shape: "sq", session: true, serve: serveDecrypt},
	35:  {name: "C_DecryptUpdate", shape: "sq", session: true, serve: serveDecryptUpdate},
	36:  {name: "C_DecryptFinal", shape: "q", session: true, serve: serveDecryptFinal},
	37:  {name: "C_DigestInit", shape: "M", session: true, serve: serveDigestInit},
	38:  {name: "C_Digest", shape: "s", session: true, serve: serveDigest},
	39:  {name: "C_DigestUpdate", shape: "s", session: true, serve: serveDigestUpdate},
	41:  {name: "C_DigestFinal", session: true, serve: serveDigestFinal},
	42:  {name: "C_SignInit", shape: "Mq", session: true, serve: serveSignInit},
	43:  {name: "C_Sign", shape: "s", session: true, serve: serveSign},
	44:  {name: "C_SignUpdate", shape: "s", session: true, serve: serveSignUpdate},
	45:  {name: "C_SignFinal", session: true, serve: serveSignFinal},
	48:  {name: "C_VerifyInit", shape: "Mq", session: true, serve: serveVerifyInit},
	49:  {name: "C_Verify", shape: "ss", session: true, serve: serveVerify},
	50:  {name: "C_VerifyUpdate", shape: "s", session: true, serve: serveVerifyUpdate},
	51:  {name: "C_VerifyFinal", shape: "s", session: true, serve: serveVerifyFinal},
	58:  {name: "C_GenerateKey", shape: "MA", session: true, serve: serveGenerateKey},
	59:  {name: "C_GenerateKeyPair", shape: "MAA", session: true, serve: serveGenerateKeyPair},
	60:  {name: "C_WrapKey", shape: "Mqqq", session: true, serve: serveWrapKey},
	61:  {name: "C_UnwrapKey", shape: "MqsA", session: true, serve: serveUnwrapKey},
	63:  {name: "C_SeedRandom", shape: "s", session: true, serve: serveSeedRandom},
	64:  {name: "C_GenerateRandom", shape: "q", session: true, serve: serveGenerateRandom},
	100: {name: "cancel operation", shape: "q", session: true, serve: serveCancel},
}

const (
	manufacturer    = "Yinjian EVALUATION ONLY" // CK_TOKEN_INFO, CK_SLOT_INFO: 32 bytes
	tokenModel      = "soft-evaluation"         // 16 bytes
	slotDescription = "Yinjian software cipher machine - EVALUATION ONLY, not certified"
	maxRandom       = 64 << 10
	maxFound        = 4096
)

// version is hardwareVersion and firmwareVersion: 1.0.
var version = []byte{1, 0}

// --- slots and tokens; on any connection ---

func serveFinalize(p *peer, _ *request, _ *builder) rv {
	p.app.close()
	return ckrOK
}

// results: u32 count | count × u64
func serveGetSlotList(p *peer, _ *request, w *builder) rv {
	ids := make([]uint64, len(p.app.slots))
	for i := range ids {
		ids[i] = uint64(i)
	}
	w.u64s(ids)
	return ckrOK
}

// results: description (64) | manufacturer (32) | u64 flags | hardware (2) | firmware (2)
func serveGetSlotInfo(p *peer, r *request, w *builder) rv {
	if _, code := p.app.slot(r.num[0]); code != ckrOK {
		return code
	}
	w.padded(slotDescription, 64)
	w.padded(manufacturer, 32)
	w.u64(ckfTokenPresent)
	w.raw(version)
	w.raw(version)
	return ckrOK
}

// results: label (32) | manufacturer (32) | model (16) | serial (16) | u64 flags | 10 × u64, as CK_TOKEN_INFO orders
// them | hardware (2) | firmware (2) | utcTime (16)
func serveGetTokenInfo(p *peer, r *request, w *builder) rv {
	a, code := p.app.slot(r.num[0])
	if code != ckrOK {
		return code
	}
	t := a.token
	t.mu.RLock()
	rec, counted := t.rec, t.tries
	t.mu.RUnlock()
	a.mu.RLock()
	open, rw := uint64(len(a.sessions)), uint64(len(a.sessions)-a.readOnly)
	a.mu.RUnlock()
	most := uint64(p.srv.profile.maxSessions)
	flags := uint64(ckfRNG | ckfLoginRequired)
	label, serial := "", ""
	if rec != nil {
		flags |= ckfTokenInitialized | counted.flags()
		if rec.user != nil {
			flags |= ckfUserPINInitialized
		}
		label, serial = string(rec.label[:]), string(rec.serial[:])
	}
	w.padded(label, 32)
	w.padded(manufacturer, 32)
	w.padded(tokenModel, 16)
	w.padded(serial, 16)
	w.u64(flags)
	for _, v := range []uint64{
		most, open, most, rw, maxPIN, minPIN,
		ckUnavailable, ckUnavailable, ckUnavailable, ckUnavailable, // memory: what the disk has
	} {
		w.u64(v)
	}
	w.raw(version)
	w.raw(version)
	w.padded("", 16) // no clock on the token
	return ckrOK
}

// results: u32 count | count × u64
func serveGetMechanismList(p *peer, r *request, w *builder) rv {
	if _, code := p.app.slot(r.num[0]); code != ckrOK {
		return code
	}
	var numbers []uint64
	for _, m := range p.srv.profile.mechanisms {
		numbers = append(numbers, m.number)
	}
	w.u64s(numbers)
	return ckrOK
}

// results: u64 smallest key | u64 largest key | u64 flags
func serveGetMechanismInfo(p *peer, r *request, w *builder) rv {
	if _, code := p.app.slot(r.num[0]); code != ckrOK {
		return code
	}
	m := p.srv.profile.find(r.num[1])
	if m == nil {
		return ckrMechanismInvalid
	}
	w.u64(m.min)
	w.u64(m.max)
	w.u64(m.flags)
	return ckrOK
}

// arguments: slot, PIN, label
func serveInitToken(p *peer, r *request, _ *builder) rv {
	a, code := p.app.slot(r.num[0])
	if code != ckrOK {
		return code
	}
	if len(r.bytes[1]) != 32 {
		return ckrArgumentsBad
	}
	return a.token.init(r.bytes[0], [32]byte(r.bytes[1]))
}

// arguments: slot, flags. The connection becomes the session's.
func serveOpenSession(p *peer, r *request, _ *builder) rv {
	if p.session != nil {
		return ckrGeneralError // one connection, one session
	}
	a, code := p.app.slot(r.num[0])
	if code != ckrOK {
		return code
	}
	p.session, code = a.open(r.num[1], p.frames.nc, p.srv.profile.maxSessions)
	return code
}

func serveCloseAllSessions(p *peer, r *request, _ *builder) rv {
	if p.session != nil {
		return ckrGeneralError // a session cannot wait for its own end
	}
	a, code := p.app.slot(r.num[0])
	if code != ckrOK {
		return code
	}
	a.closeAll()
	return ckrOK
}

// --- sessions ---

func serveCloseSession(p *peer, _ *request, _ *builder) rv {
	p.session.closeLocked()
	return ckrOK
}

// results: u64 slot | u64 state | u64 flags | u64 device error
func serveGetSessionInfo(p *peer, _ *request, w *builder) rv {
	s := p.session
	state := uint64(cksROPublic)
	switch role := s.slot.view().role; {
	case role == officer:
		state = cksRWSO
	case s.readWrite() && role == user:
		state = cksRWUser
	case s.readWrite():
		state = cksRWPublic
	case role == user:
		state = cksROUser
	}
	w.u64(s.slot.token.slot)
	w.u64(state)
	w.u64(s.flags)
	w.u64(0)
	return ckrOK
}

func serveInitPIN(p *peer, r *request, _ *builder) rv {
	return p.session.slot.initPIN(r.bytes[0])
}

func serveSetPIN(p *peer, r *request, _ *builder) rv {
	if !p.session.readWrite() {
		return ckrSessionReadOnly
	}
	return p.session.slot.changePIN(r.bytes[0], r.bytes[1])
}

func serveLogin(p *peer, r *request, _ *builder) rv {
	switch r.num[0] {
	case p.srv.profile.userType():
		return p.session.slot.login(user, r.bytes[0])
	case ckuSO:
		return p.session.slot.login(officer, r.bytes[0])
	case ckuContext:
		return ckrOperationNotInitialized // no key asks for it
	}
	return ckrUserTypeInvalid
}

func serveLogout(p *peer, _ *request, _ *builder) rv { return p.session.slot.logout() }

// --- objects ---

// place puts new objects where their CKA_TOKEN says and writes their handles to w, in order.
func (p *peer) place(w *builder, v view, objects ...*object) rv {
	s := p.session
	var onToken, inSession []*object
	for _, o := range objects {
		if o.attributes().bool(ckaToken) {
			onToken = append(onToken, o)
		} else {
			inSession = append(inSession, o)
		}
	}
	code := s.slot.addSession(s, v, inSession...)
	if code == ckrOK && len(onToken) > 0 {
		if code = s.slot.token.add(onToken...); code != ckrOK {
			s.slot.mu.Lock()
			for _, o := range inSession {
				s.slot.drop(o)
			}
			s.slot.mu.Unlock()
		}
	}
	if code != ckrOK {
		for _, o := range objects {
			o.discard()
		}
		return code
	}
	handles := s.slot.handlesOf(v, objects...)
	if len(handles) != len(objects) {
		return ckrUserNotLoggedIn // logged out while it was stored
	}
	for _, h := range handles {
		w.u64(h)
	}
	return ckrOK
}

// mayWrite says whether the session may make or change objects with these attributes (base table 6).
func (s *session) mayWrite(v view, templates ...[]attribute) rv {
	for _, templ := range templates {
		for _, a := range templ {
			set := len(a.value) == 1 && a.value[0] == 1
			if a.typ == ckaToken && set && !s.readWrite() {
				return ckrSessionReadOnly
			}
			if a.typ == ckaPrivate && set && v.role != user {
				return ckrUserNotLoggedIn
			}
		}
	}
	return ckrOK
}

// arguments: template; results: u64 handle
func serveCreateObject(p *peer, r *request, w *builder) rv {
	v := p.session.slot.view()
	if code := p.session.mayWrite(v, r.templ[0]); code != ckrOK {
		return code
	}
	o, code := p.srv.profile.createObject(r.templ[0])
	if code != ckrOK {
		return code
	}
	if !v.mayTouch(o) {
		o.discard()
		return ckrUserNotLoggedIn // a secret key is private, whether its template says so or not
	}
	return p.place(w, v, o)
}

// arguments: handle, template; results: u64 handle
func serveCopyObject(p *peer, r *request, w *builder) rv {
	s := p.session
	o, v := s.slot.object(r.num[0])
	if o == nil {
		return ckrObjectHandleInvalid
	}
	if !v.mayTouch(o) {
		return ckrUserNotLoggedIn
	}
	fresh, code := o.copyOf(r.templ[0], v.role)
	if code != ckrOK {
		return code
	}
	attrs := fresh.attributes()
	if attrs.bool(ckaToken) && !s.readWrite() {
		code = ckrSessionReadOnly
	} else if !v.mayTouch(fresh) {
		code = ckrUserNotLoggedIn
	}
	if code != ckrOK {
		fresh.discard()
		return code
	}
	return p.place(w, v, fresh)
}

func serveDestroyObject(p *peer, r *request, _ *builder) rv {
	s := p.session
	o, v := s.slot.object(r.num[0])
	if o == nil {
		return ckrObjectHandleInvalid
	}
	if !v.mayTouch(o) {
		return ckrUserNotLoggedIn
	}
	attrs := o.attributes()
	if !attrs.bool(ckaDestroyable) {
		return ckrActionProhibited
	}
	if !attrs.bool(ckaToken) {
		s.slot.mu.Lock()
		defer s.slot.mu.Unlock()
		s.slot.drop(o)
		return ckrOK
	}
	if !s.readWrite() {
		return ckrSessionReadOnly
	}
	code := s.slot.token.destroy(o)
	if code == ckrOK {
		s.slot.mu.Lock()
		s.slot.forget(o)
		s.slot.mu.Unlock()
		p.log().WithField("object", string(attrs[ckaLabel])).Info("object destroyed")
	}
	return code
}

func serveGetObjectSize(p *peer, r *request, w *builder) rv {
	o, _ := p.session.slot.object(r.num[0])
	if o == nil {
		return ckrObjectHandleInvalid
	}
	w.u64(o.size())
	return ckrOK
}

// arguments: handle, types; results: u32 count | count × (u8 0 here, 1 sensitive, 2 not there | u32 length | value).
// The module knows the caller's buffers and compares lengths.
func serveGetAttributeValue(p *peer, r *request, w *builder) rv {
	o, _ := p.session.slot.object(r.num[0])
	if o == nil {
		return ckrObjectHandleInvalid
	}
	attrs := o.attributes()
	class := attrs.class()
	w.u32(uint32(len(r.types)))
	for _, typ := range r.types {
		v, ok := p.srv.profile.attribute(p.session, o, attrs, typ)
		switch {
		case ok:
			w.u8(0)
		case sensitive(class, typ):
			w.u8(1)
		default:
			w.u8(2)
		}
		w.string(v)
		if len(w.b) > maxFrame {
			return ckrHostMemory
		}
	}
	return ckrOK
}

func serveSetAttributeValue(p *peer, r *request, _ *builder) rv {
	s := p.session
	o, v := s.slot.object(r.num[0])
	if o == nil {
		return ckrObjectHandleInvalid
	}
	attrs := o.attributes()
	if !attrs.bool(ckaModifiable) {
		return ckrActionProhibited
	}
	onToken := attrs.bool(ckaToken)
	if onToken && !s.readWrite() {
		return ckrSessionReadOnly
	}
	changes, code := readTemplate(r.templ[0], attrs.class(), toModify)
	if code != ckrOK {
		return code
	}
	if _, trust := changes[ckaTrusted]; !v.mayTouch(o) && (!trust || len(changes) > 1) {
		return ckrUserNotLoggedIn
	}
	if onToken {
		return s.slot.token.modify(o, changes, v.role)
	}
	s.slot.mu.Lock()
	defer s.slot.mu.Unlock()
	attrs = o.attributes()
	if code := attrs.tightens(changes, v.role); code != ckrOK {
		return code
	}
	fresh := attrs.with(changes)
	o.attrs.Store(&fresh)
	return ckrOK
}

func serveFindObjectsInit(p *peer, r *request, _ *builder) rv {
	s := p.session
	if s.find != nil {
		return ckrOperationActive
	}
	objects, v := s.slot.search(r.templ[0])
	s.find = &search{rest: s.slot.handlesOf(v, objects...)}
	return ckrOK
}

// arguments: how many; results: u32 count | count × u64. Objects that went since the search began are left out.
func serveFindObjects(p *peer, r *request, w *builder) rv {
	s := p.session
	if s.find == nil {
		return ckrOperationNotInitialized
	}
	limit := min(r.num[0], maxFound)
	var out []uint64
	for uint64(len(out)) < limit && len(s.find.rest) > 0 {
		h := s.find.rest[0]
		s.find.rest = s.find.rest[1:]
		if o, _ := s.slot.object(h); o != nil {
			out = append(out, h)
		}
	}
	w.u64s(out)
	return ckrOK
}

func serveFindObjectsFinal(p *peer, _ *request, _ *builder) rv {
	if p.session.find == nil {
		return ckrOperationNotInitialized
	}
	p.session.find = nil
	return ckrOK
}

// --- keys ---

// arguments: mechanism, template; results: u64 handle
func serveGenerateKey(p *peer, r *request, w *builder) rv {
	v := p.session.slot.view()
	if v.role != user {
		return ckrUserNotLoggedIn // the key will be private
	}
	if code := p.session.mayWrite(v, r.templ[0]); code != ckrOK {
		return code
	}
	o, code := p.srv.profile.generateSecret(r.mech, r.templ[0])
	if code != ckrOK {
		return code
	}
	return p.generated(p.place(w, v, o), o)
}

// arguments: mechanism, public template, private template; results: u64 public handle | u64 private handle
func serveGenerateKeyPair(p *peer, r *request, w *builder) rv {
	v := p.session.slot.view()
	if v.role != user {
		return ckrUserNotLoggedIn
	}
	if code := p.session.mayWrite(v, r.templ[0], r.templ[1]); code != ckrOK {
		return code
	}
	select {
	case p.srv.generating <- struct{}{}:
	case <-p.srv.stopping:
		return ckrFunctionFailed
	}
	public, private, code := p.srv.profile.generatePair(r.mech, r.templ[0], r.templ[1])
	<-p.srv.generating
	if code != ckrOK {
		return code
	}
	return p.generated(p.place(w, v, public, private), private)
}

func (p *peer) generated(code rv, o *object) rv {
	if code == ckrOK && o.attributes().bool(ckaToken) {
		p.log().WithField("object", string(o.attributes()[ckaLabel])).Info("key generated")
	}
	return code
}

// --- digests ---

// arguments: mechanism; results: u32 length of the digest
func serveDigestInit(p *peer, r *request, w *builder) rv {
	if p.session.digest != nil {
		return ckrOperationActive
	}
	row := p.srv.profile.find(r.mech.number)
	if row == nil || row.flags&ckfDigest == 0 {
		return ckrMechanismInvalid
	}
	if len(r.mech.param) != 0 {
		return ckrMechanismParamInvalid
	}
	p.session.digest = &digest{hash: newDigest(row.op)}
	w.u32(uint32(p.session.digest.hash.Size()))
	return ckrOK
}

// results: the digest
func serveDigest(p *peer, r *request, w *builder) rv {
	d := p.session.digest
	p.session.digest = nil
	if d == nil || d.updated {
		return ckrOperationNotInitialized
	}
	d.hash.Write(r.bytes[0])
	w.string(d.hash.Sum(nil))
	return ckrOK
}

func serveDigestUpdate(p *peer, r *request, _ *builder) rv {
	d := p.session.digest
	if d == nil {
		return ckrOperationNotInitialized
	}
	d.updated = true
	d.hash.Write(r.bytes[0])
	return ckrOK
}

func serveDigestFinal(p *peer, _ *request, w *builder) rv {
	d := p.session.digest
	p.session.digest = nil
	if d == nil {
		return ckrOperationNotInitialized
	}
	w.string(d.hash.Sum(nil))
	return ckrOK
}

// --- signatures ---

// arguments: mechanism, key; results: u32 longest signature, so that the module can answer for its length
func serveSignInit(p *peer, r *request, w *builder) rv {
	s := p.session
	if s.sign != nil && s.sign.alive(s.slot) {
		return ckrOperationActive
	}
	if p.srv.profile.mayNotSign(s) {
		return ckrSessionReadOnly
	}
	op, code := p.srv.profile.begin(s.slot, r.mech, r.num[0], ckaSign)
	if code != ckrOK {
		return code
	}
	s.sign = op
	w.u32(op.size())
	return ckrOK
}

func serveSign(p *peer, r *request, w *builder) rv {
	op, code := take(&p.session.sign, p.session.slot, false)
	if code != ckrOK {
		return code
	}
	return p.sign(op, r.bytes[0], w)
}

func serveSignUpdate(p *peer, r *request, _ *builder) rv {
	return update(&p.session.sign, p.session.slot, r.bytes[0])
}

func serveSignFinal(p *peer, _ *request, w *builder) rv {
	op, code := take(&p.session.sign, p.session.slot, true)
	if code != ckrOK {
		return code
	}
	return p.sign(op, nil, w)
}

func (p *peer) sign(op *signature, data []byte, w *builder) rv {
	var started time.Time
	if p.srv.service > 0 {
		started = time.Now() // interval
	}
	out, code := op.sign(op.input(data))
	if code != ckrOK {
		return code
	}
	if !op.row.isMAC() {
		if err := p.session.slot.token.countUse(op.key); err != nil {
			p.log().WithError(err).Error("a signature was withheld")
			return storageRV(err)
		}
	}
	if p.srv.service > 0 {
		serviceDelay(started, p.srv.service, p.srv.stopping)
	}
	w.string(out)
	return ckrOK
}

func update(op **signature, a *appSlot, data []byte) rv {
	if *op == nil {
		return ckrOperationNotInitialized
	}
	if !(*op).alive(a) {
		*op = nil
		return ckrOperationNotInitialized
	}
	code := (*op).update(data)
	if code != ckrOK {
		*op = nil
	}
	return code
}

func serveVerifyInit(p *peer, r *request, _ *builder) rv {
	s := p.session
	if s.verify != nil && s.verify.alive(s.slot) {
		return ckrOperationActive
	}
	op, code := p.srv.profile.begin(s.slot, r.mech, r.num[0], ckaVerify)
	if code != ckrOK {
		return code
	}
	s.verify = op
	return ckrOK
}

// arguments: data, signature
func serveVerify(p *peer, r *request, _ *builder) rv {
	op, code := take(&p.session.verify, p.session.slot, false)
	if code != ckrOK {
		return code
	}
	return op.check(op.input(r.bytes[0]), r.bytes[1])
}

func serveVerifyUpdate(p *peer, r *request, _ *builder) rv {
	return update(&p.session.verify, p.session.slot, r.bytes[0])
}

func serveVerifyFinal(p *peer, r *request, _ *builder) rv {
	op, code := take(&p.session.verify, p.session.slot, true)
	if code != ckrOK {
		return code
	}
	return op.check(op.input(nil), r.bytes[0])
}

// --- encryption: arguments are the data and the room in the caller's buffer, see crypt ---

func serveEncryptInit(p *peer, r *request, _ *builder) rv {
	return p.beginCipher(&p.session.encrypt, r, true)
}

func serveDecryptInit(p *peer, r *request, _ *builder) rv {
	return p.beginCipher(&p.session.decrypt, r, false)
}

func (p *peer) beginCipher(op **ciphering, r *request, encrypt bool) rv {
	a := p.session.slot
	if *op != nil && (*op).key.alive((*op).view, a) {
		return ckrOperationActive
	}
	c, code := p.srv.profile.beginCipher(a, r.mech, r.num[0], encrypt)
	if code == ckrOK {
		*op = c
	}
	return code
}

func serveEncrypt(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.encrypt, p.session.slot, r.bytes[0], r.num[0], partWhole, w)
}

func serveEncryptUpdate(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.encrypt, p.session.slot, r.bytes[0], r.num[0], partUpdate, w)
}

func serveEncryptFinal(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.encrypt, p.session.slot, nil, r.num[0], partFinal, w)
}

func serveDecrypt(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.decrypt, p.session.slot, r.bytes[0], r.num[0], partWhole, w)
}

func serveDecryptUpdate(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.decrypt, p.session.slot, r.bytes[0], r.num[0], partUpdate, w)
}

func serveDecryptFinal(p *peer, r *request, w *builder) rv {
	return crypt(&p.session.decrypt, p.session.slot, nil, r.num[0], partFinal, w)
}

// --- wrapping ---

// arguments: mechanism, wrapping key, key, room; results as crypt's
func serveWrapKey(p *peer, r *request, w *builder) rv {
	a, profile := p.session.slot, p.srv.profile
	how, code := profile.readWrapping(r.mech, ckfWrap)
	if code != ckrOK {
		return code
	}
	kek, v := a.object(r.num[0])
	key, _ := a.object(r.num[1])
	if code := profile.mayWrap(kek, key, v); code != ckrOK {
		return code
	}
	out, code := how.wrap(kek, key)
	if code != ckrOK {
		return code
	}
	if room := r.num[2]; room == ckUnavailable || uint64(len(out)) > room {
		return tooSmall(w, len(out))
	}
	w.u8(1)
	w.string(out)
	if attrs := key.attributes(); attrs.bool(ckaToken) {
		p.log().WithField("object", string(attrs[ckaLabel])).Info("key wrapped")
	}
	return ckrOK
}

// arguments: mechanism, unwrapping key, wrapped key, template; results: u64 handle
func serveUnwrapKey(p *peer, r *request, w *builder) rv {
	a, profile := p.session.slot, p.srv.profile
	how, code := profile.readWrapping(r.mech, ckfUnwrap)
	if code != ckrOK {
		return code
	}
	kek, v := a.object(r.num[0])
	if kek == nil || v.role != user {
		return ckrUnwrappingKeyHandleInvalid
	}
	attrs := kek.attributes()
	if !profile.isSM4(attrs) {
		return ckrUnwrappingKeyInconsistent
	}
	if !attrs.bool(ckaUnwrap) {
		return ckrKeyFunctionNotPermitted
	}
	if code := p.session.mayWrite(v, r.templ[0]); code != ckrOK {
		return code
	}
	o, code := profile.unwrap(how, kek, r.bytes[0], r.templ[0])
	if code != ckrOK {
		return code
	}
	return p.place(w, v, o)
}

// serveCancel ends an operation that the module refused to complete, as PKCS#11 has a refused C_Sign end it.
// arguments: 1 signing, 2 verifying, 3 digesting, 4 encrypting, 5 decrypting
func serveCancel(p *peer, r *request, _ *builder) rv {
	switch r.num[0] {
	case 1:
		p.session.sign = nil
	case 2:
		p.session.verify = nil
	case 3:
		p.session.digest = nil
	case 4:
		p.session.encrypt = nil
	case 5:
		p.session.decrypt = nil
	default:
		return ckrArgumentsBad
	}
	return ckrOK
}

// --- random numbers ---

// serveSeedRandom stirs the seed into the kernel's pool, which gives it no credit for entropy.
func serveSeedRandom(_ *peer, r *request, _ *builder) rv {
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return ckrFunctionFailed
	}
	defer f.Close()
	if _, err := f.Write(r.bytes[0]); err != nil {
		return ckrFunctionFailed
	}
	return ckrOK
}

// arguments: how many bytes, at most 64 KiB (the module asks again for more); results: the bytes
func serveGenerateRandom(_ *peer, r *request, w *builder) rv {
	if r.num[0] > maxRandom {
		return ckrArgumentsBad
	}
	b := make([]byte, r.num[0])
	rand.Read(b)
	w.string(b)
	return ckrOK
}
