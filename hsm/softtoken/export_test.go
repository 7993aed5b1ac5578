package softtoken

import "math/big"

// DefaultPBKDF2Iterations is what a daemon uses that no test has hastened.
var DefaultPBKDF2Iterations = pbkdf2Iterations

// UsePBKDF2Iterations makes tests of other things quicker.
func UsePBKDF2Iterations(n int) { pbkdf2Iterations = n }

// PBKDF2Iterations is what is written into new records.
func PBKDF2Iterations() int { return pbkdf2Iterations }

// FailWrites has fault asked before each step of a write; nil ends it.
func (s *Server) FailWrites(fault func(step string) error) {
	if fault == nil {
		s.store.fault.Store(nil)
		return
	}
	s.store.fault.Store(&fault)
}

// HMACSM3 is the computation behind the mechanism, for published vectors with keys that PKCS#11 cannot bring in.
func HMACSM3(key, data []byte) []byte {
	h := newHMAC(key)
	h.Write(data)
	return h.Sum(nil)
}

// SignSM2Message and VerifySM2Message are the computations behind SM2_SM3, with a key from outside.
func SignSM2Message(d, id, message []byte) (sig []byte, e []byte, err error) {
	key, err := newSM2Secret(d)
	if err != nil {
		return nil, nil, err
	}
	h := hashZA(&key.sm2.PublicKey, id)
	h.Write(message)
	e = h.Sum(nil)
	sig, code := signSM2(key.sm2, e, encRaw)
	if code != ckrOK {
		return nil, nil, errMalformed
	}
	return sig, e, nil
}

func VerifySM2Message(point, id, message, sig []byte) uint64 {
	pub, err := parsePoint(point)
	if err != nil {
		return uint64(ckrGeneralError)
	}
	h := hashZA(pub, id)
	h.Write(message)
	return uint64(verifySM2(pub, h.Sum(nil), sig, encRaw))
}

// ParseRequest parses a frame and encodes it again. known is false for a call that has no row.
func ParseRequest(frame []byte) (again []byte, known bool, err error) {
	spec, r, err := parseRequest(frame)
	if err != nil || spec == nil {
		return nil, spec != nil, err
	}
	return encodeRequest(spec, r), true, nil
}

// Shapes are the calls' argument shapes by number.
func Shapes() map[uint32]string {
	m := map[uint32]string{}
	for i, spec := range calls {
		if spec != nil {
			m[uint32(i)] = spec.shape
		}
	}
	return m
}

// DecodeRecords runs the decoders of what stands inside the seals, and encodes again what they take.
func DecodeRecords(b []byte) (again [][]byte) {
	if r, err := decodeTokenRecord(b); err == nil {
		again = append(again, r.encode())
	}
	if attrs, secret, err := decodeObject(b); err == nil {
		again = append(again, encodeObject(attrs, secret))
	}
	(&record{}).decode(b)
	return again
}

// SampleRecords are a token's record and an object, as they stand inside the seals.
func SampleRecords() [][]byte {
	return [][]byte{
		(&tokenRecord{officer: &credential{}}).encode(), (&tokenRecord{officer: &credential{}, user: &credential{}}).encode(),
		encodeObject(attributes{0: {1}, 3: []byte("label")}, []byte("secret")),
	}
}

// ServeFrame has one frame served on a connection of its own, with or without a session, and answers the reply.
func (s *Server) ServeFrame(frame []byte, inSession bool) (reply []byte, err error) {
	p := &peer{srv: s, app: newApplication([16]byte{}, 1, 0, s.tokens)}
	if inSession {
		sess, code := p.app.slots[0].open(ckfSerialSession|ckfRWSession, nil, maxSessions)
		if code != ckrOK {
			return nil, errMalformed
		}
		p.session = sess
		defer sess.close()
	}
	spec, r, err := parseRequest(frame)
	if err != nil {
		return nil, err
	}
	if spec != nil && (spec.name == "C_OpenSession" || spec.name == "C_CloseAllSessions" || spec.name == "C_Finalize" || spec.secret) {
		return nil, nil
	}
	w := newReply(nil)
	return finishReply(w, p.serve(spec, &r, w)), nil
}

// MaxOfProcess is how many connections one process may have, MaxConnections how many all may, MaxHandshakes how many strangers.
const (
	MaxOfProcess   = maxOfProcess
	MaxConnections = maxConnections
	MaxHandshakes  = maxHandshakes
)

// Peers counts the connections that were taken, strangers' too.
func (s *Server) Peers() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.peers)
}

// OccupyGeneration takes all places for making key pairs.
func (s *Server) OccupyGeneration() (release func()) {
	for range maxGenerating {
		s.generating <- struct{}{}
	}
	return func() {
		for range maxGenerating {
			<-s.generating
		}
	}
}

// OpenPrivate counts the private objects of a slot that are open in memory, and says whether a key to open them is.
func (s *Server) OpenPrivate(slot int) (n int, keyed bool) {
	t := s.tokens[slot]
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, r := range t.records {
		for _, it := range r.items {
			if it.sealed != nil && it.object != nil {
				n++
			}
		}
	}
	return n, t.inner != nil
}

// Secrets answers the numbers that a slot's open private keys consist of, to see whether they are wiped.
func (s *Server) Secrets(slot int) []*big.Int {
	t := s.tokens[slot]
	t.mu.RLock()
	defer t.mu.RUnlock()
	var all []*big.Int
	for _, r := range t.records {
		for _, it := range r.items {
			if it.object == nil || it.object.secret == nil {
				continue
			}
			if k := it.object.secret.sm2; k != nil {
				all = append(all, k.D)
			}
			if k := it.object.secret.rsa; k != nil {
				all = append(append(all, k.D), k.Primes...)
			}
		}
	}
	return all
}

// UseVendorNumbers has the server answer to numbers of a vendor that writes signatures in DER. Before Serve.
func (s *Server) UseVendorNumbers() {
	s.profile = &profile{name: "test vendor", sm2KeyType: 0x80000004, maxSessions: maxSessions, mechanisms: []mechanism{
		{number: 0x80008001, op: opGenSM2, flags: ckfGenerateKeyPair},
		{number: 0x80008101, op: opSM2SignSM3, param: paramSM2ID, encoding: encDER, flags: ckfSign | ckfVerify},
		{number: 0x80008104, op: opSM2Sign, encoding: encDER, flags: ckfSign | ckfVerify},
	}}
}

// ServeAsUser has frames served one after the other in a session of slot 0 whose user is logged in, and answers the
// replies to those that parse.
func (s *Server) ServeAsUser(pin string, frames [][]byte) (replies [][]byte) {
	p := &peer{srv: s, app: newApplication([16]byte{}, 1, 0, s.tokens)}
	a := p.app.slots[0]
	a.next = 0
	sess, code := a.open(ckfSerialSession|ckfRWSession, nil, maxSessions)
	if code == ckrOK {
		p.session = sess
		defer sess.close()
		code = a.login(user, []byte(pin))
	}
	if code != ckrOK {
		panic(code)
	}
	all, v := a.search(nil)
	a.handlesOf(v, all...)
	for _, frame := range frames {
		spec, r, err := parseRequest(frame)
		if err != nil {
			replies = append(replies, finishReply(newReply(nil), ckrGeneralError))
			continue
		}
		w := newReply(nil)
		replies = append(replies, finishReply(w, p.serve(spec, &r, w)))
	}
	return replies
}

// Impersonate says whether a profile's file can be answered to.
func Impersonate(path string) error {
	_, err := impersonate(path)
	return err
}

// Labelled counts the objects that a search for the label looks at.
func (s *Server) Labelled(slot uint, label string) int {
	return len(s.tokens[slot].labelled(label, true))
}
