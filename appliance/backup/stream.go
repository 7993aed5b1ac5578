// Package backup is an appliance's backup as a file: sealed to custodians, any M of whom open it, and what it says of
// itself.
//
// A backup is a tar archive (POSIX.1-2001, by archive/tar) in a sealed stream. Its last member is the [Manifest] with the
// digest of each other one. The stream's key is fresh for each file and sealed to the custodians' SM2 pair
// (appliance/custody), whose private half exists as their shares alone: taking a backup needs no secret, opening it needs M
// of them. Anybody can seal something to a public key, so that a file is the appliance's own only if its digest stands in
// the journal: a [Receipt] is that entry with its proof under a signed checkpoint.
//
// Where the bytes come from, and what is in a backup and what is not, is for the callers to say.
package backup

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/emmansun/gmsm/sm3"
	"github.com/emmansun/gmsm/sm4"

	"yinjian/appliance/custody"
)

// A file:
//
//	"YINJIAN BACKUP 1\n" | u32 length of the header | header, JSON | chunk | chunk | …
//
// and a chunk, numbers big-endian:
//
//	u64 number, from 0 | u32 length of the plain bytes, its highest bit set in the last chunk | SM4-GCM ciphertext and tag
//
// The nonce is four zero bytes and the number, under a key of the file's own. Additional data are SM3 of everything before
// the first chunk, and the chunk's own twelve bytes. So each chunk stands in this file, at this place, and only the last
// one ends it (the construction STREAM of Hoang, Reyhanitabar, Rogaway and Vizár, CRYPTO 2015).
const (
	magic       = "YINJIAN BACKUP 1\n"
	maxHeader   = 64 << 10
	chunkSize   = 1 << 20
	frameSize   = 12
	lastChunk   = 1 << 31
	tagSize     = 16
	keySize     = 16
	formatNo    = 1
	sealPurpose = "yinjian/backup/v1 "
)

// ErrDamaged is what the errors about a file that is not as it was written are. They say where and how.
var ErrDamaged = errors.New("备份文件已损坏 (the backup is not as it was written)")

// ErrNewer refuses a file of a later format.
var ErrNewer = errors.New("备份由更新的版本写成，请用那个版本的程序恢复 (written by a later version: restore with that one)")

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w：%s", ErrDamaged, fmt.Sprintf(format, args...))
}

// A Header is what a file says in clear.
type Header struct {
	Format  int    `json:"format"`
	ID      string `json:"id"` // 16 hexadecimal digits
	Node    string `json:"node"`
	Epoch   string `json:"epoch"` // of the journal when it was taken
	Program string `json:"program"`
	At      string `json:"at"`  // RFC 3339; the journal's entries have trusted time
	Set     string `json:"set"` // of the custodians' shares
	// Threshold of the holders open it.
	Threshold int      `json:"threshold"`
	Holders   []string `json:"holders"`
	// Base is the backup that this one continues; nil: it is whole.
	Base *Base `json:"base,omitempty"`
	// Key is the stream's key, sealed to the custodians.
	Key []byte `json:"key"`
}

// A Base is an earlier backup, and up to which segment of the journal it and those before it have everything.
type Base struct {
	ID      string `json:"id"`
	SM3     string `json:"sm3"` // of its file, hexadecimal
	Through int    `json:"through"`
}

// NewID draws a backup's id.
func NewID() string {
	b := make([]byte, 8)
	rand.Read(b) // never fails (crypto/rand)
	return fmt.Sprintf("%x", b)
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := sm4.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func nonceOf(number uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, frameSize), number)
}

// A Sealer seals what is written to it. Not safe for concurrent use.
type Sealer struct {
	w      io.Writer
	aead   cipher.AEAD
	bound  []byte // SM3 of what stands before the chunks
	plain  []byte
	sealed []byte
	number uint64
	err    error
}

// NewSealer writes h, whose Format and Key it fills in, to w and seals to point (an SM2 public point). Without Close the
// file has no end, and nobody takes it for whole.
func NewSealer(w io.Writer, h Header, point []byte) (*Sealer, error) {
	key := make([]byte, keySize)
	defer clear(key)
	rand.Read(key) // never fails (crypto/rand)
	var err error
	h.Format = formatNo
	if h.Key, err = custody.SealTo(point, key, sealPurpose+h.ID); err != nil {
		return nil, err
	}
	body, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(body) > maxHeader {
		return nil, fmt.Errorf("backup: a header of %d bytes", len(body))
	}
	head := binary.BigEndian.AppendUint32([]byte(magic), uint32(len(body)))
	head = append(head, body...)
	s := &Sealer{w: w, bound: sum(head), plain: make([]byte, 0, chunkSize), sealed: make([]byte, 0, frameSize+chunkSize+tagSize)}
	if s.aead, err = newGCM(key); err != nil {
		return nil, err
	}
	_, err = w.Write(head)
	return s, err
}

func sum(b []byte) []byte {
	h := sm3.Sum(b)
	return h[:]
}

// Write implements io.Writer.
func (s *Sealer) Write(b []byte) (n int, err error) {
	for len(b) > 0 && s.err == nil {
		if len(s.plain) == chunkSize { // only now is it known that it is not the last
			s.flush(0)
		}
		k := copy(s.plain[len(s.plain):chunkSize], b)
		s.plain, b, n = s.plain[:len(s.plain)+k], b[k:], n+k
	}
	return n, s.err
}

func (s *Sealer) flush(flag uint32) {
	if s.err != nil {
		return
	}
	frame := binary.BigEndian.AppendUint64(s.sealed[:0], s.number)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(s.plain))|flag)
	out := s.aead.Seal(frame, nonceOf(s.number), s.plain, append(bytes.Clone(s.bound), frame...))
	_, s.err = s.w.Write(out)
	s.number++
	s.plain = s.plain[:0]
}

// Close writes the last chunk. It does not close what is below.
func (s *Sealer) Close() error {
	s.flush(lastChunk)
	clear(s.plain[:cap(s.plain)])
	return s.err
}

// ReadHeader reads the header that a file begins with, and everything up to the first chunk, which [NewOpener] wants.
func ReadHeader(r io.Reader) (*Header, []byte, error) {
	head := make([]byte, len(magic)+4)
	if _, err := io.ReadFull(r, head); err != nil || !bytes.HasPrefix(head, []byte(magic)) {
		if err == nil || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err = damaged("不是印鉴的备份文件，或开头已改 (not a backup, or its beginning was changed)")
		}
		return nil, nil, err
	}
	n := binary.BigEndian.Uint32(head[len(magic):])
	if n > maxHeader {
		return nil, nil, damaged("头部长 %d 字节 (a header of that length)", n)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, nil, damaged("在头部之内截断 (cut off within its header)")
	}
	h := new(Header)
	if err := json.Unmarshal(body, h); err != nil {
		return nil, nil, damaged("头部无法解读 (its header cannot be read)")
	}
	if h.Format > formatNo {
		return nil, nil, fmt.Errorf("%w：格式 %d，程序 %s", ErrNewer, h.Format, h.Program)
	}
	return h, append(head, body...), nil
}

// An Opener reads what a [Sealer] sealed. What it has delivered was written there, at that place; that nothing is missing
// at the end is known when it answers io.EOF.
type Opener struct {
	r      io.Reader
	aead   cipher.AEAD
	bound  []byte
	sealed []byte
	plain  []byte // not read yet
	number uint64
	last   bool
	err    error
}

// NewOpener opens the stream after the header with the custodians' secret, which the caller wipes. A wrong one is an error
// at once.
func NewOpener(r io.Reader, h *Header, head, seed []byte) (*Opener, error) {
	key, err := custody.OpenWith(seed, h.Key, sealPurpose+h.ID)
	if err != nil {
		return nil, fmt.Errorf("这套份额打不开该备份，或其头部已改 (these shares do not open it, or its header was changed): %w", err)
	}
	defer clear(key)
	o := &Opener{r: r, bound: sum(head), sealed: make([]byte, chunkSize+tagSize)}
	o.aead, err = newGCM(key)
	return o, err
}

// Read implements io.Reader.
func (o *Opener) Read(b []byte) (int, error) {
	for len(o.plain) == 0 && o.err == nil {
		o.err = o.next()
	}
	if len(o.plain) == 0 {
		return 0, o.err
	}
	n := copy(b, o.plain)
	o.plain = o.plain[n:]
	return n, nil
}

// next opens the next chunk.
func (o *Opener) next() error {
	var frame [frameSize]byte
	n, err := io.ReadFull(o.r, frame[:])
	switch {
	case o.last && n == 0 && errors.Is(err, io.EOF):
		return io.EOF
	case o.last:
		return damaged("结束标记之后还有数据 (bytes after its end)")
	case errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF):
		return damaged("在第 %d 块处截断 (cut off at chunk %d)", o.number+1, o.number+1)
	case err != nil:
		return err
	}
	number, length := binary.BigEndian.Uint64(frame[:8]), binary.BigEndian.Uint32(frame[8:])
	last := length&lastChunk != 0
	length &^= lastChunk
	switch {
	case number != o.number:
		return damaged("第 %d 块处是第 %d 块：有块被调换、重复或删去 (chunk %d stands where %d belongs: reordered, repeated or left out)", o.number+1, number+1, number+1, o.number+1)
	case length > chunkSize:
		return damaged("第 %d 块被改动 (chunk %d was changed)", o.number+1, o.number+1)
	}
	sealed := o.sealed[:length+tagSize]
	if _, err := io.ReadFull(o.r, sealed); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return damaged("在第 %d 块之内截断 (cut off within chunk %d)", o.number+1, o.number+1)
	} else if err != nil {
		return err
	}
	o.plain, err = o.aead.Open(sealed[:0], nonceOf(o.number), sealed, append(bytes.Clone(o.bound), frame[:]...))
	if err != nil {
		o.plain = nil
		return damaged("第 %d 块被改动，或属于另一文件 (chunk %d was changed, or is another file's)", o.number+1, o.number+1)
	}
	o.number++
	o.last = last
	return nil
}
