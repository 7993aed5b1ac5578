package softtoken

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"
)

const (
	helloMagic  = "YJP1"
	maxFrame    = 1 << 20 // bytes after the length field, either way
	maxListed   = 256     // attributes of a template, or attribute types
	peerTimeout = 10 * time.Second
	idleBuffer  = 8 << 10 // bytes a connection keeps while it waits
)

// An attribute is one CK_ATTRIBUTE; value is as it lies in memory. In a request it borrows the frame's bytes.
type attribute struct {
	typ   uint64
	value []byte
}

// A mechParam is a CK_MECHANISM; param borrows the frame's bytes.
type mechParam struct {
	number uint64
	param  []byte
}

// A request is a decoded frame. Arguments of one shape are held in order of appearance.
type request struct {
	call  uint32
	num   [3]uint64
	bytes [2][]byte
	templ [2][]attribute
	types []uint64
	mech  mechParam
}

var errMalformed = errors.New("softtoken: malformed request")

// parseRequest decodes a frame without its length field. It answers no row when the call is not known, and
// [errMalformed] when the arguments do not fit the row. What it answers borrows b.
func parseRequest(b []byte) (*callSpec, request, error) {
	var r request
	if len(b) < 4 {
		return nil, r, fmt.Errorf("%w: %d bytes", errMalformed, len(b))
	}
	r.call = binary.BigEndian.Uint32(b)
	var spec *callSpec
	if r.call < uint32(len(calls)) {
		spec = calls[r.call]
	}
	if spec == nil {
		return nil, r, nil
	}
	in := scanner{b: b[4:]}
	var nums, datas, templs int
	for _, shape := range spec.shape {
		switch shape {
		case 'q':
			r.num[nums] = in.u64()
			nums++
		case 's':
			r.bytes[datas] = in.string()
			datas++
		case 'A':
			n := in.count(12)
			as := make([]attribute, 0, n)
			for range n {
				as = append(as, attribute{typ: in.u64(), value: in.string()})
			}
			r.templ[templs] = as
			templs++
		case 'T':
			n := in.count(8)
			r.types = make([]uint64, 0, n)
			for range n {
				r.types = append(r.types, in.u64())
			}
		case 'M':
			r.mech = mechParam{number: in.u64(), param: in.string()}
		}
	}
	if in.bad || len(in.b) != 0 {
		return spec, r, fmt.Errorf("%w: %s", errMalformed, spec.name)
	}
	return spec, r, nil
}

// A scanner takes values from the front of b. After the first that does not fit, bad is set and all are zero.
type scanner struct {
	b   []byte
	bad bool
}

func (s *scanner) take(n int) []byte {
	if s.bad || n < 0 || n > len(s.b) {
		s.bad = true
		return nil
	}
	out := s.b[:n:n]
	s.b = s.b[n:]
	return out
}

func (s *scanner) u8() uint8 {
	if b := s.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (s *scanner) u32() uint32 {
	if b := s.take(4); b != nil {
		return binary.BigEndian.Uint32(b)
	}
	return 0
}

func (s *scanner) u64() uint64 {
	if b := s.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (s *scanner) string() []byte {
	n := s.u32()
	if n > maxFrame {
		s.bad = true
		return nil
	}
	return s.take(int(n))
}

// count reads how many items of at least size bytes follow; it is 0 when they cannot be there.
func (s *scanner) count(size int) int {
	n := s.u32()
	if n > maxListed || int(n)*size > len(s.b) {
		s.bad = true
	}
	if s.bad {
		return 0
	}
	return int(n)
}

// A builder appends values in the shapes that a scanner reads.
type builder struct{ b []byte }

func (w *builder) u8(v uint8)      { w.b = append(w.b, v) }
func (w *builder) u32(v uint32)    { w.b = binary.BigEndian.AppendUint32(w.b, v) }
func (w *builder) u64(v uint64)    { w.b = binary.BigEndian.AppendUint64(w.b, v) }
func (w *builder) raw(p []byte)    { w.b = append(w.b, p...) }
func (w *builder) string(p []byte) { w.u32(uint32(len(p))); w.raw(p) }

// padded writes s in n bytes, filled with spaces and cut at n.
func (w *builder) padded(s string, n int) {
	for i := range n {
		if i < len(s) {
			w.u8(s[i])
		} else {
			w.u8(' ')
		}
	}
}

func (w *builder) u64s(vs []uint64) {
	w.u32(uint32(len(vs)))
	for _, v := range vs {
		w.u64(v)
	}
}

// encodeRequest is the inverse of parseRequest: a frame without its length field. The module is its writer in
// production; tests and fuzzing use it to hold the parser to one encoding.
func encodeRequest(spec *callSpec, r request) []byte {
	var w builder
	w.u32(r.call)
	var nums, datas, templs int
	for _, shape := range spec.shape {
		switch shape {
		case 'q':
			w.u64(r.num[nums])
			nums++
		case 's':
			w.string(r.bytes[datas])
			datas++
		case 'A':
			w.u32(uint32(len(r.templ[templs])))
			for _, a := range r.templ[templs] {
				w.u64(a.typ)
				w.string(a.value)
			}
			templs++
		case 'T':
			w.u64s(r.types)
		case 'M':
			w.u64(r.mech.number)
			w.string(r.mech.param)
		}
	}
	return w.b
}

const replyHeader = 4 + 8

// newReply starts a frame in buf's storage; finishReply fills in its header.
func newReply(buf []byte) *builder {
	return &builder{b: append(buf[:0], make([]byte, replyHeader)...)}
}

// finishReply completes the frame. A result that would not fit becomes CKR_HOST_MEMORY, as PKCS#11 has no word for
// an answer that is too long.
func finishReply(w *builder, code rv) []byte {
	if len(w.b)-4 > maxFrame {
		code = ckrHostMemory
	}
	if code != ckrOK {
		clear(w.b[replyHeader:])
		w.b = w.b[:replyHeader]
	}
	binary.BigEndian.PutUint32(w.b, uint32(len(w.b)-4))
	binary.BigEndian.PutUint64(w.b[4:], uint64(code))
	return w.b
}

// A frameConn reads and writes frames on one connection. One goroutine uses it.
type frameConn struct {
	nc      net.Conn
	in      []byte // in[start:end] is read and not yet consumed
	start   int
	end     int
	limited bool      // a deadline for reading is set: within a frame
	writeBy time.Time // the deadline set for writing
}

// fill reads until n bytes are at hand, n ≤ cap(in). Once the first byte is there the others must come within
// peerTimeout; the wait for the first has no limit if idle is set.
func (f *frameConn) fill(n int, idle bool) error {
	if f.end-f.start >= n {
		return nil
	}
	if f.start > 0 {
		copy(f.in, f.in[f.start:f.end])
		f.end, f.start = f.end-f.start, 0
	}
	for f.end < n {
		if !f.limited && (!idle || f.end > 0) {
			if err := f.nc.SetReadDeadline(time.Now().Add(peerTimeout)); err != nil { // interval
				return err
			}
			f.limited = true
		}
		k, err := f.nc.Read(f.in[f.end:])
		f.end += k
		if err != nil && f.end < n {
			return err
		}
	}
	return nil
}

// next answers the next frame without its length field. The bytes are valid until done.
func (f *frameConn) next() ([]byte, error) {
	if f.in == nil {
		f.in = make([]byte, idleBuffer)
	}
	if err := f.fill(4, true); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(f.in[f.start:])
	if n < 4 || n > maxFrame {
		return nil, fmt.Errorf("%w: frame of %d bytes", errMalformed, n)
	}
	// A large frame gets its memory as its bytes arrive, so that a length alone costs nothing.
	for need := 4 + int(n); ; {
		step := min(need, len(f.in))
		if err := f.fill(step, false); err != nil {
			return nil, err
		}
		if step == need {
			if f.limited {
				f.limited = false
				if err := f.nc.SetReadDeadline(time.Time{}); err != nil {
					return nil, err
				}
			}
			return f.in[f.start+4 : f.start+need], nil
		}
		grown := make([]byte, min(need, 4*len(f.in)))
		f.end = copy(grown, f.in[f.start:f.end])
		clear(f.in)
		f.in, f.start = grown, 0
	}
}

// done gives back the n bytes of the frame that next answered. With wipe they are overwritten.
func (f *frameConn) done(n int, wipe bool) {
	if wipe {
		clear(f.in[f.start : f.start+4+n])
	}
	f.start += 4 + n
	if f.start == f.end {
		f.start, f.end = 0, 0
		if len(f.in) > idleBuffer {
			f.in = make([]byte, idleBuffer)
		}
	}
}

func (f *frameConn) write(b []byte) error {
	// Setting a deadline costs a timer; one that is good for ten to twenty seconds serves many replies.
	if now := time.Now(); f.writeBy.Sub(now) < peerTimeout { // interval
		f.writeBy = now.Add(2 * peerTimeout)
		if err := f.nc.SetWriteDeadline(f.writeBy); err != nil {
			return err
		}
	}
	_, err := f.nc.Write(b)
	return err
}

// hello reads the 20 bytes that open a connection.
func (f *frameConn) hello() (id [16]byte, err error) {
	var b [len(helloMagic) + 16]byte
	if err := f.nc.SetReadDeadline(time.Now().Add(peerTimeout)); err != nil { // interval
		return id, err
	}
	if _, err := io.ReadFull(f.nc, b[:]); err != nil {
		return id, err
	}
	if string(b[:4]) != helloMagic {
		return id, fmt.Errorf("%w: not the module's protocol", errMalformed)
	}
	copy(id[:], b[4:])
	return id, f.nc.SetReadDeadline(time.Time{})
}
