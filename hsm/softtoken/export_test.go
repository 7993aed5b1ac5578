package softtoken

// UsePBKDF2Iterations makes tests of other things quicker.
func UsePBKDF2Iterations(n int) { pbkdf2Iterations = n }

// PBKDF2Iterations is what is written into new records.
func PBKDF2Iterations() int { return pbkdf2Iterations }

// FailWrites has fault asked before each step of a write.
func (s *Server) FailWrites(fault func(step string) error) { s.store.fault = fault }

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

// DecodeRecords runs the decoders of what stands inside the seals.
func DecodeRecords(b []byte) {
	decodeTokenRecord(b)
	decodeObject(b)
	(&record{}).decode(b)
}

// ServeFrame has one frame served on a connection of its own, with or without a session, and answers the reply.
func (s *Server) ServeFrame(frame []byte, inSession bool) (reply []byte, err error) {
	p := &peer{srv: s, app: newApplication([16]byte{}, 1, 0, s.tokens)}
	if inSession {
		sess, code := p.app.slots[0].open(ckfSerialSession|ckfRWSession, nil)
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
