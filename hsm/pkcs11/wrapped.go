package pkcs11

import (
	"container/list"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"sync"

	"github.com/emmansun/gmsm/sm2"
	p11 "github.com/miekg/pkcs11"

	"yinjian/hsm"
)

// DefaultWrappedKeys is how many wrapped keys are kept unwrapped where Config says nothing. Every cipher machine that was
// looked at has room for so many session objects.
const DefaultWrappedKeys = 1024

// maxHolders bounds the sessions that unwrap.
const maxHolders = 4

// WrapForm says how C_WrapKey and C_UnwrapKey are parametrised.
type WrapForm int

const (
	// WrapGCM: CK_GCM_PARAMS without an IV and with additional data; the token draws the nonce and puts it in front.
	WrapGCM WrapForm = iota + 1
	// WrapCBCPad: an IV, which we draw and put in front. It authenticates nothing: each unwrapped key is tried.
	WrapCBCPad
)

// A Wrapping says how keys are wrapped. Form 0: the machine cannot, or its profile does not say.
type Wrapping struct {
	Type uint // CKM_*
	Form WrapForm
	KEK  KeyTemplate // of the key that wraps, SM4
}

const ivSize = 16

// mechanism answers the mechanism for a blob and what frees it.
func (w Wrapping) mechanism(aad, iv []byte) (m []*p11.Mechanism, free func()) {
	if w.Form == WrapGCM {
		params := p11.NewGCMParams(nil, aad, 128)
		return []*p11.Mechanism{p11.NewMechanism(w.Type, params)}, params.Free
	}
	return []*p11.Mechanism{p11.NewMechanism(w.Type, iv)}, func() {}
}

// wrap is C_WrapKey.
func (t *Token) wrap(s p11.SessionHandle, kek, key p11.ObjectHandle, aad []byte) ([]byte, error) {
	w := t.cfg.Profile.Wrapping
	var iv []byte
	if w.Form == WrapCBCPad {
		iv = make([]byte, ivSize)
		rand.Read(iv) // never fails (crypto/rand)
	}
	m, free := w.mechanism(aad, iv)
	defer free()
	out, err := t.lib.ctx.WrapKey(s, m, kek, key)
	if err != nil {
		return nil, call("C_WrapKey", err)
	}
	return append(iv, out...), nil
}

// unwrap is C_UnwrapKey into a session object that signs and does nothing else.
func (t *Token) unwrap(s p11.SessionHandle, kek p11.ObjectHandle, key *hsm.WrappedKey) (p11.ObjectHandle, error) {
	w := t.cfg.Profile.Wrapping
	template, ok := t.cfg.Profile.Keys[key.Algorithm]
	if !ok || template.Secret {
		return 0, &hsm.Error{Call: "C_UnwrapKey", RV: 0x70}
	}
	aad, err := hsm.WrappingAAD(key.Label, key.Algorithm, key.Public)
	if err != nil {
		return 0, err
	}
	blob := key.Blob
	var iv []byte
	if w.Form == WrapCBCPad {
		if len(blob) <= ivSize {
			return 0, errBlob
		}
		iv, blob = blob[:ivSize], blob[ivSize:]
	}
	m, free := w.mechanism(aad, iv)
	defer free()
	h, err := t.lib.ctx.UnwrapKey(s, m, kek, blob, []*p11.Attribute{
		p11.NewAttribute(p11.CKA_CLASS, uint(p11.CKO_PRIVATE_KEY)), p11.NewAttribute(p11.CKA_KEY_TYPE, template.KeyType),
		p11.NewAttribute(p11.CKA_TOKEN, false), p11.NewAttribute(p11.CKA_PRIVATE, true),
		p11.NewAttribute(p11.CKA_SENSITIVE, true), p11.NewAttribute(p11.CKA_EXTRACTABLE, false),
		p11.NewAttribute(p11.CKA_SIGN, true), p11.NewAttribute(p11.CKA_DECRYPT, false), p11.NewAttribute(p11.CKA_UNWRAP, false),
	})
	err = t.cfg.Profile.translate(call("C_UnwrapKey", err))
	var e *hsm.Error
	if errors.As(err, &e) && (e.RV == hsm.CKR_GENERAL_ERROR || e.RV == hsm.CKR_FUNCTION_FAILED) {
		// What a module without a better word may say of a bad blob: it must not cost a reconnect. A machine that is broken
		// will say so of the next signature.
		err = fmt.Errorf("%w (%w)", errBlob, errors.New(e.Error()))
	}
	return h, err
}

var errBlob error = &hsm.Error{Call: "C_UnwrapKey", RV: 0x110} // CKR_WRAPPED_KEY_INVALID

// kek finds the wrapping key, and refuses one that is not trusted, or that could leave the token itself.
func (t *Token) kek(s p11.SessionHandle, gen uint64, label string) (p11.ObjectHandle, error) {
	h, err := t.handle(s, gen, handleKey{label: label, secret: true})
	if err != nil {
		return 0, fmt.Errorf("wrapping key %q: %w", label, err)
	}
	t.mu.Lock()
	known := t.gen == gen && t.keks[label] == h
	t.mu.Unlock()
	if known {
		return h, nil
	}
	a, err := t.attributes(s, h, p11.CKA_TRUSTED, p11.CKA_EXTRACTABLE, p11.CKA_SENSITIVE, p11.CKA_WRAP, p11.CKA_UNWRAP)
	if err != nil {
		return 0, fmt.Errorf("wrapping key %q: %w", label, err)
	}
	if !boolean(a[p11.CKA_TRUSTED]) || !boolean(a[p11.CKA_SENSITIVE]) || len(a[p11.CKA_EXTRACTABLE]) != 1 || boolean(a[p11.CKA_EXTRACTABLE]) {
		return 0, fmt.Errorf("%w: wrapping key %q: want CKA_TRUSTED, CKA_SENSITIVE, and not CKA_EXTRACTABLE (trusted %v, sensitive %v)",
			hsm.ErrNoWrapping, label, boolean(a[p11.CKA_TRUSTED]), boolean(a[p11.CKA_SENSITIVE]))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gen == gen {
		t.keks[label] = h
	}
	return h, nil
}

// canWrap answers hsm.ErrNoWrapping where wrapped keys are not for this machine.
func (t *Token) canWrap() error {
	if t.cfg.Profile.Wrapping.Form == 0 {
		return fmt.Errorf("%w: profile %q names no wrapping operation", hsm.ErrNoWrapping, t.cfg.Profile.Name)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.solo {
		return fmt.Errorf("%w: the token has room for one session, and unwrapped keys need another", hsm.ErrNoWrapping)
	}
	return nil
}

// GenerateWrapped implements hsm.Token.
//
// The trial signature is over random bytes and is dropped here; nothing outside the process ever sees it.
func (t *Token) GenerateWrapped(ctx context.Context, spec hsm.KeySpec, kek string) (hsm.KeyInfo, []byte, error) {
	fail := func(err error) (hsm.KeyInfo, []byte, error) {
		return hsm.KeyInfo{}, nil, fmt.Errorf("hsm/pkcs11: generating wrapped %s key %q: %w", spec.Algorithm, spec.Label, err)
	}
	for _, label := range []string{spec.Label, kek} {
		if err := checkLabel(label); err != nil {
			return fail(err)
		}
	}
	if err := t.canWrap(); err != nil {
		return fail(err)
	}
	template, ok := t.cfg.Profile.Keys[spec.Algorithm]
	if !ok || template.Secret {
		return fail(fmt.Errorf("profile %q makes no such key pairs: %w", t.cfg.Profile.Name, &hsm.Error{Call: "C_GenerateKeyPair", RV: 0x70}))
	}
	id := spec.ID
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id) // never fails (crypto/rand)
	}
	var info hsm.KeyInfo
	var blob []byte
	err := t.run(ctx, false, func(s p11.SessionHandle, gen uint64) (err error) {
		outer, err := t.kek(s, gen, kek)
		if err != nil {
			return err
		}
		info, blob, err = t.generateWrapped(s, outer, template, spec, id)
		if err != nil {
			return err
		}
		key, err := hsm.NewWrappedKey(spec.Label, spec.Algorithm, info.Public, kek, blob)
		if err != nil {
			return err
		}
		return t.tryWrapped(s, outer, key)
	})
	if err != nil {
		return fail(err)
	}
	return info, blob, nil
}

// generateWrapped makes the pair, wraps its private half and destroys both halves.
func (t *Token) generateWrapped(s p11.SessionHandle, kek p11.ObjectHandle, template KeyTemplate, spec hsm.KeySpec, id []byte) (info hsm.KeyInfo, blob []byte, err error) {
	// 1. As session objects, without a label: what finds keys by theirs must not find these.
	public, private := template.templates("", id)
	flag := func(typ uint, v bool) Attribute { return Attribute{Type: typ, Value: p11.NewAttribute(typ, v).Value} }
	without := KeyTemplate{Omit: []uint{p11.CKA_LABEL}}
	public = without.finish(public, []Attribute{flag(p11.CKA_TOKEN, false)})
	private = without.finish(private, []Attribute{flag(p11.CKA_TOKEN, false), flag(p11.CKA_EXTRACTABLE, true), flag(p11.CKA_WRAP_WITH_TRUSTED, true)})
	pub, priv, err := t.lib.ctx.GenerateKeyPair(s, []*p11.Mechanism{p11.NewMechanism(template.Generate, nil)}, public, private)
	if err != nil {
		return info, nil, call("C_GenerateKeyPair", err)
	}
	defer func() {
		// An object that stays would stay for as long as the session: an error closes it.
		for _, h := range []p11.ObjectHandle{priv, pub} {
			if derr := t.lib.ctx.DestroyObject(s, h); derr != nil && err == nil {
				err = call("C_DestroyObject", derr)
			}
		}
	}()

	// 2. What the token made of the template.
	info, err = t.keyInfo(s, priv, false, map[string][]p11.ObjectHandle{halfKey(id, ""): {pub}})
	if err != nil {
		return info, nil, err
	}
	a, err := t.attributes(s, priv, p11.CKA_WRAP_WITH_TRUSTED)
	if err != nil {
		return info, nil, err
	}
	if trusted := boolean(a[p11.CKA_WRAP_WITH_TRUSTED]); !trusted || !info.Sensitive || !info.Extractable {
		return info, nil, fmt.Errorf("%w: the token made a key with sensitive %v, extractable %v, wrap with trusted %v; want all three; it was destroyed",
			hsm.ErrNoWrapping, info.Sensitive, info.Extractable, trusted)
	}
	info.Label = spec.Label
	aad, err := hsm.WrappingAAD(spec.Label, spec.Algorithm, info.Public)
	if err != nil {
		return info, nil, err
	}
	blob, err = t.wrap(s, kek, priv, aad)
	return info, blob, err
}

// tryWrapped unwraps the key, looks at what the token made of it, has it sign, verifies and destroys it.
func (t *Token) tryWrapped(s p11.SessionHandle, kek p11.ObjectHandle, key *hsm.WrappedKey) (err error) {
	h, err := t.unwrap(s, kek, key)
	if err != nil {
		return err
	}
	defer func() {
		if derr := t.lib.ctx.DestroyObject(s, h); derr != nil && err == nil {
			err = call("C_DestroyObject", derr)
		}
	}()
	if err := t.confined(s, h); err != nil {
		return err
	}
	return t.trial(s, h, key)
}

// confined refuses an unwrapped key that could leave the token.
func (t *Token) confined(s p11.SessionHandle, h p11.ObjectHandle) error {
	a, err := t.attributes(s, h, p11.CKA_SENSITIVE, p11.CKA_EXTRACTABLE)
	if err != nil {
		return err
	}
	if !boolean(a[p11.CKA_SENSITIVE]) || len(a[p11.CKA_EXTRACTABLE]) != 1 || boolean(a[p11.CKA_EXTRACTABLE]) {
		return fmt.Errorf("%w: the token unwrapped a key as extractable, or as not sensitive", hsm.ErrNoWrapping)
	}
	return nil
}

// trial has the unwrapped key sign random bytes and verifies that.
func (t *Token) trial(s p11.SessionHandle, h p11.ObjectHandle, key *hsm.WrappedKey) error {
	op := hsm.SignSM2E
	if key.Algorithm == hsm.RSA2048 {
		op = hsm.SignRSASHA256
	}
	m, ok := t.cfg.Profile.Operations[op]
	if !ok {
		return &hsm.Error{Call: "C_SignInit", RV: 0x70}
	}
	digest := make([]byte, 32)
	rand.Read(digest) // never fails (crypto/rand)
	sig, err := t.lib.sign(s, m, h, m.input(digest))
	if err != nil {
		return err
	}
	good := false
	switch pub := key.Public.(type) {
	case *ecdsa.PublicKey:
		if r, v, err := hsm.NormalizeSM2(sig); err == nil {
			good = sm2.Verify(pub, digest, r, v)
		}
	case *rsa.PublicKey:
		good = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest, sig) == nil
	}
	if !good {
		return fmt.Errorf("%w: its trial signature does not verify with the public key", errBlob)
	}
	return nil
}

// DoWrapped implements hsm.Token.
func (t *Token) DoWrapped(ctx context.Context, key *hsm.WrappedKey, op hsm.Operation, data []byte) ([]byte, error) {
	m, ok := t.cfg.Profile.Operations[op]
	switch {
	case !ok || op == hsm.MACSM3 || m.Input == InputZM:
		return nil, fmt.Errorf("hsm/pkcs11: profile %q has no operation %s for wrapped keys: %w", t.cfg.Profile.Name, op,
			&hsm.Error{Call: "C_SignInit", RV: 0x70})
	case op != hsm.SignSM2M && len(data) != 32 || len(data) > maxData:
		return nil, fmt.Errorf("hsm/pkcs11: %s over %d bytes: %w", op, len(data), &hsm.Error{Call: "C_Sign", RV: 0x21})
	}
	if err := t.canWrap(); err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: %s with wrapped key %q: %w", op, key.Label, err)
	}
	input := m.input(data)
	holder := t.holderOf(key.Digest())
	var out []byte
	err := t.run(ctx, false, func(s p11.SessionHandle, gen uint64) error {
		u, err := holder.take(s, gen, key)
		if err != nil {
			return err
		}
		out, err = t.lib.sign(s, m, u.object, input)
		if err = t.cfg.Profile.translate(err); hsm.ClassifyError(err) == hsm.ClassRefind {
			holder.lost(u)
			if e := t.loggedIn(s); e != nil {
				err = e
			}
		}
		holder.give(u)
		return err
	})
	if err == nil {
		err = m.Output.check(out)
	}
	if err != nil {
		return nil, fmt.Errorf("hsm/pkcs11: %s with wrapped key %q: %w", op, key.Label, err)
	}
	return out, nil
}

// ForgetWrapped implements hsm.Token. An operation that is under way with the key comes to its end first.
func (t *Token) ForgetWrapped(ctx context.Context, digest [32]byte) error {
	holder := t.holderOf(digest)
	if !holder.has(digest) {
		return nil
	}
	err := t.run(ctx, false, func(_ p11.SessionHandle, gen uint64) error {
		holder.forget(digest, gen)
		return nil
	})
	if err != nil {
		return fmt.Errorf("hsm/pkcs11: forgetting a wrapped key: %w", err)
	}
	return nil
}

func (t *Token) holderOf(digest [32]byte) *holder { return t.holders[int(digest[0])%len(t.holders)] }

// A holder keeps unwrapped keys: the session whose objects they are, for a session object goes with the session that made
// it, and which of them was used for longest ago. A token has several, so that keys are unwrapped side by side.
type holder struct {
	t *Token

	use     sync.Mutex // held around each call on session, guards what follows; taken before mu
	session p11.SessionHandle
	open    bool
	libGen  uint64 // that session belongs to
	epoch   uint64 // counts sessions: an object of an earlier one is gone, and its number may be another's

	mu    sync.Mutex // guards what follows
	gen   uint64     // that the entries belong to
	most  int
	keys  map[[32]byte]*list.Element // of *unwrapped
	order *list.List                 // used last in front
}

// An unwrapped key is one session object. What changes of it is guarded by the holder's mu.
type unwrapped struct {
	digest [32]byte
	label  string
	object p11.ObjectHandle
	epoch  uint64 // of the session whose object it is
	users  int
	doomed bool // evicted; the last user destroys it
	gone   bool // the token does not know the object any more
}

func newHolder(t *Token, most int) *holder {
	return &holder{t: t, most: most, keys: map[[32]byte]*list.Element{}, order: list.New()}
}

// cached answers the key if it is unwrapped, as in use.
func (h *holder) cached(key *hsm.WrappedKey, gen uint64) *unwrapped {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.keys[key.Digest()]
	if e == nil || h.gen != gen {
		return nil
	}
	u := e.Value.(*unwrapped)
	if u.label != key.Label {
		return nil // the use log would have another's name
	}
	h.order.MoveToFront(e)
	u.users++
	return u
}

func (h *holder) has(digest [32]byte) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.keys[digest] != nil
}

// take answers the key's object, unwrapping it if need be; give gives it back. The caller holds lib.use and a session of
// generation gen.
func (h *holder) take(s p11.SessionHandle, gen uint64, key *hsm.WrappedKey) (*unwrapped, error) {
	if u := h.cached(key, gen); u != nil {
		return u, nil
	}
	if key.Blob == nil {
		return nil, hsm.ErrNotCached
	}
	kek, err := h.t.kek(s, gen, key.KEK)
	if err != nil {
		return nil, err
	}
	h.use.Lock()
	defer h.use.Unlock()
	if u := h.cached(key, gen); u != nil {
		return u, nil // another call was waiting for it too
	}
	fresh, err := h.ready(gen)
	if err != nil {
		return nil, err
	}
	object, err := h.t.unwrap(h.session, kek, key)
	if hsm.ClassifyError(err) == hsm.ClassBackpressure && h.shrink() {
		object, err = h.t.unwrap(h.session, kek, key)
	}
	switch hsm.ClassifyError(err) {
	case hsm.ClassRefind:
		h.t.forget(handleKey{label: key.KEK, secret: true}, kek)
	case hsm.ClassPermanent, hsm.ClassBackpressure:
	default:
		if err != nil {
			h.reset(true)
		}
	}
	if err != nil {
		return nil, err
	}
	if fresh {
		err = h.t.confined(h.session, object)
	}
	if err == nil && h.t.cfg.Profile.Wrapping.Form != WrapGCM {
		err = h.t.trial(h.session, object, key)
	}
	if err != nil {
		_ = h.t.lib.ctx.DestroyObject(h.session, object) // the error tells more than this one would
		return nil, err
	}
	u := &unwrapped{digest: key.Digest(), label: key.Label, object: object, epoch: h.epoch, users: 1}
	h.mu.Lock()
	var out []*unwrapped
	if old := h.keys[u.digest]; old != nil {
		out = h.drop(out, old) // under another label
	}
	h.keys[u.digest] = h.order.PushFront(u)
	for e := h.order.Back(); h.order.Len() > h.most && e != nil && e != h.order.Front(); e = h.order.Back() {
		out = h.drop(out, e)
	}
	h.mu.Unlock()
	h.destroy(out)
	return u, nil
}

// ready opens the session unless there is one of generation gen. fresh says that no key was unwrapped in it. use is held.
func (h *holder) ready(gen uint64) (fresh bool, err error) {
	t := h.t
	h.mu.Lock()
	same := h.gen == gen
	none := h.order.Len() == 0
	h.mu.Unlock()
	if h.open && same {
		return none, nil
	}
	h.reset(h.libGen == t.lib.gen)
	t.mu.Lock()
	slot := t.slot
	t.mu.Unlock()
	flags := uint(p11.CKF_SERIAL_SESSION)
	if t.cfg.Profile.readWrite {
		flags |= p11.CKF_RW_SESSION
	}
	s, err := t.lib.ctx.OpenSession(slot, flags)
	if err != nil {
		return false, t.cfg.Profile.translate(call("C_OpenSession", err))
	}
	h.session, h.open, h.libGen = s, true, t.lib.gen
	h.mu.Lock()
	h.gen = gen
	h.mu.Unlock()
	return true, nil
}

// reset forgets everything. With ours the session is closed, with which its objects go. use is held.
func (h *holder) reset(ours bool) {
	if h.open && ours {
		_ = h.t.lib.ctx.CloseSession(h.session)
	}
	h.open = false
	h.epoch++
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.keys)
	h.order.Init()
}

// shrink makes room on a token that has none for another object, and keeps to it. It answers false when there is nothing to
// give up. use is held.
func (h *holder) shrink() bool {
	h.mu.Lock()
	var out []*unwrapped
	h.most = max(1, h.order.Len()*3/4)
	for h.order.Len() > 0 && h.order.Len() >= h.most {
		out = h.drop(out, h.order.Back())
	}
	most := h.most
	h.mu.Unlock()
	if len(out) > 0 {
		h.t.cfg.Log.WithField("keys", most).Warning("token is short of memory, cache of unwrapped keys shrunk")
	}
	return h.destroy(out)
}

// drop takes an entry out. One that is in use is left to its last user. mu is held.
func (h *holder) drop(out []*unwrapped, e *list.Element) []*unwrapped {
	u := e.Value.(*unwrapped)
	h.order.Remove(e)
	delete(h.keys, u.digest)
	if u.users > 0 {
		u.doomed = true
		return out
	}
	return append(out, u)
}

// destroy destroys the objects of entries that were dropped, and says whether one was. use is held.
func (h *holder) destroy(out []*unwrapped) (some bool) {
	for _, u := range out {
		if u.gone || !h.open || u.epoch != h.epoch {
			continue
		}
		if err := h.t.lib.ctx.DestroyObject(h.session, u.object); err != nil {
			h.t.cfg.Log.WithError(call("C_DestroyObject", err)).Warning("an unwrapped key could not be destroyed, its session is closed")
			h.reset(true)
			return true
		}
		some = true
	}
	return some
}

// give ends a use. The caller holds lib.use.
func (h *holder) give(u *unwrapped) {
	h.mu.Lock()
	u.users--
	last := u.doomed && u.users == 0
	h.mu.Unlock()
	if !last {
		return
	}
	h.use.Lock()
	defer h.use.Unlock()
	h.destroy([]*unwrapped{u})
}

// lost forgets an object that the token does not know.
func (h *holder) lost(u *unwrapped) {
	h.mu.Lock()
	defer h.mu.Unlock()
	u.gone = true
	if e := h.keys[u.digest]; e != nil && e.Value == u {
		h.order.Remove(e)
		delete(h.keys, u.digest)
	}
}

// forget drops one key. The caller holds lib.use.
func (h *holder) forget(digest [32]byte, gen uint64) {
	h.use.Lock()
	defer h.use.Unlock()
	h.mu.Lock()
	var out []*unwrapped
	if e := h.keys[digest]; e != nil && h.gen == gen {
		out = h.drop(out, e)
	}
	h.mu.Unlock()
	h.destroy(out)
}
