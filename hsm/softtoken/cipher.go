package softtoken

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"io"
	"slices"

	gmcipher "github.com/emmansun/gmsm/cipher"
	"github.com/emmansun/gmsm/sm2"
	"github.com/emmansun/gmsm/sm4"
)

const (
	gcmNonce = 12
	gcmTag   = 16

	// maxBuffered is the most plaintext of one call, or of an operation that gives nothing before its end; the result
	// must fit a frame.
	maxBuffered = maxFrame - 4096

	// sm2Overhead is how much longer a ciphertext is than its plaintext: C1 and C3, and at most, in DER, four headers.
	sm2Overhead    = 65 + 32
	sm2OverheadDER = 2*35 + 34 + 5 + 5
)

// A part is where in an operation a call stands.
type part int

const (
	partWhole  part = iota // C_Encrypt, C_Decrypt
	partUpdate             // C_EncryptUpdate, C_DecryptUpdate
	partFinal              // C_EncryptFinal, C_DecryptFinal
)

// A ciphering is a running C_Encrypt or C_Decrypt operation.
type ciphering struct {
	row     *mechanism
	key     *object
	view    view
	encrypt bool
	block   cipher.Block // SM4
	iv      []byte       // SM4-CBC: the block before the next one
	gcm     gcmParam
	pending []byte // what was brought and is not through yet
	updated bool
}

// A gcmParam is what CK_GCM_PARAMS says.
type gcmParam struct{ iv, aad []byte }

// readGCM reads the flattened CK_GCM_PARAMS: an IV of size bytes and a tag of 128 bits, nothing else.
func readGCM(param []byte, size int) (gcmParam, rv) {
	in := scanner{b: param}
	g := gcmParam{iv: bytes.Clone(in.string()), aad: bytes.Clone(in.string())}
	if bits := in.u64(); in.bad || len(in.b) != 0 || len(g.iv) != size || bits != 8*gcmTag {
		return g, ckrMechanismParamInvalid
	}
	return g, ckrOK
}

// beginCipher starts encrypting or decrypting.
func (p *profile) beginCipher(a *appSlot, m mechParam, handle uint64, encrypt bool) (*ciphering, rv) {
	row := p.find(m.number)
	flag, what := uint64(ckfDecrypt), uint64(ckaDecrypt)
	if encrypt {
		flag, what = ckfEncrypt, ckaEncrypt
	}
	if row == nil || row.flags&flag == 0 {
		return nil, ckrMechanismInvalid
	}
	c := &ciphering{row: row, encrypt: encrypt}
	var code rv
	if row.param == paramGCM {
		c.gcm, code = readGCM(m.param, gcmNonce)
	} else {
		var iv []byte
		iv, code = row.readParam(m.param)
		c.iv = bytes.Clone(iv)
	}
	if code != ckrOK {
		return nil, code
	}
	c.key, c.view = a.object(handle)
	if c.key == nil || c.key.private() && c.view.role != user {
		return nil, ckrKeyHandleInvalid
	}
	attrs := c.key.attributes()
	if row.op == opSM2Crypt {
		class := uint64(ckoPrivateKey)
		if encrypt {
			class = ckoPublicKey
		}
		if attrs.class() != class || c.key.sm2 == nil {
			return nil, ckrKeyTypeInconsistent
		}
	} else if !p.isSM4(attrs) {
		return nil, ckrKeyTypeInconsistent
	}
	if !attrs.bool(what) {
		return nil, ckrKeyFunctionNotPermitted
	}
	if row.op != opSM2Crypt {
		if c.block = c.key.sm4(); c.block == nil {
			return nil, ckrKeyHandleInvalid
		}
	}
	return c, ckrOK
}

// sm4 answers the cipher of an SM4 key, nil when the key is wiped.
func (o *object) sm4() cipher.Block {
	var block cipher.Block
	o.secret.use(func() rv {
		var err error
		if block, err = sm4.NewCipher(o.secret.raw); err != nil {
			panic(err) // an SM4 key has 16 bytes
		}
		return ckrOK
	})
	return block
}

// wrongLength is the code for data that is no number of blocks, or too long.
func (c *ciphering) wrongLength() rv {
	if c.encrypt {
		return ckrDataLenRange
	}
	return ckrEncryptedDataLenRange
}

// whole says whether the operation gives nothing before all is there: GCM, whose plaintext is nobody's before the tag
// was checked, and SM2.
func (c *ciphering) whole() bool { return c.row.op == opSM4GCM || c.row.op == opSM2Crypt }

// room answers the most bytes that a call with n more bytes can give.
func (c *ciphering) room(n int, at part) (int, rv) {
	n += len(c.pending)
	most := maxBuffered
	if !c.encrypt {
		most += sm2OverheadDER // what was encrypted can be decrypted
	}
	if n > most {
		return 0, c.wrongLength()
	}
	blocks := n / sm4Size * sm4Size
	switch {
	case at == partUpdate && c.whole():
		return 0, ckrOK
	case at == partUpdate && c.row.op == opSM4CBCPad && !c.encrypt:
		return max(n-1, 0) / sm4Size * sm4Size, ckrOK // the last block may be padding
	case at == partUpdate:
		return blocks, ckrOK
	case c.row.op == opSM2Crypt && c.encrypt:
		if n == 0 {
			return 0, ckrDataLenRange
		}
		if c.row.encoding == encDER {
			return n + sm2OverheadDER, ckrOK
		}
		return n + sm2Overhead, ckrOK
	case c.row.op == opSM2Crypt:
		return max(n-sm2Overhead, 0), ckrOK
	case c.row.op == opSM4GCM && c.encrypt:
		return n + gcmTag, ckrOK
	case c.row.op == opSM4GCM:
		if n < gcmTag {
			return 0, ckrEncryptedDataLenRange
		}
		return n - gcmTag, ckrOK
	case c.row.op == opSM4CBCPad && c.encrypt:
		return blocks + sm4Size, ckrOK
	case n != blocks, c.row.op == opSM4CBCPad && n == 0:
		return 0, c.wrongLength()
	}
	return blocks, ckrOK
}

// run gives what a call gives. Only partUpdate changes the operation, and it cannot fail after room did not: so a call
// whose buffer proves too small can be made again.
func (c *ciphering) run(data []byte, at part) ([]byte, rv) {
	all := slices.Concat(c.pending, data)
	if at == partUpdate {
		n, _ := c.room(len(data), at)
		out := c.blocks(all[:n])
		if n > 0 && c.row.op != opSM4ECB {
			last := out
			if !c.encrypt {
				last = all
			}
			c.iv = bytes.Clone(last[n-sm4Size : n])
		}
		clear(c.pending)
		c.pending, c.updated = bytes.Clone(all[n:]), true
		clear(all)
		return out, ckrOK
	}
	defer clear(all)
	switch {
	case c.row.op == opSM2Crypt:
		return c.sm2(all)
	case c.row.op == opSM4GCM:
		return c.gcm.run(c.block, all, c.encrypt)
	case c.row.op == opSM4CBCPad && c.encrypt:
		n := sm4Size - len(all)%sm4Size
		all = append(all, bytes.Repeat([]byte{byte(n)}, n)...)
		return c.blocks(all), ckrOK
	case c.row.op == opSM4CBCPad:
		out, ok := unpad(c.blocks(all))
		if !ok {
			return nil, ckrEncryptedDataInvalid
		}
		return out, ckrOK
	}
	return c.blocks(all), ckrOK
}

// blocks runs whole blocks through ECB or CBC.
func (c *ciphering) blocks(in []byte) []byte {
	var mode cipher.BlockMode
	switch {
	case len(in) == 0:
		return nil
	case c.row.op == opSM4ECB && c.encrypt:
		mode = gmcipher.NewECBEncrypter(c.block)
	case c.row.op == opSM4ECB:
		mode = gmcipher.NewECBDecrypter(c.block)
	case c.encrypt:
		mode = cipher.NewCBCEncrypter(c.block, c.iv)
	default:
		mode = cipher.NewCBCDecrypter(c.block, c.iv)
	}
	out := make([]byte, len(in))
	mode.CryptBlocks(out, in)
	return out
}

// unpad takes the padding of CKM_AES_CBC_PAD away (RFC 5652 §6.3).
func unpad(b []byte) ([]byte, bool) {
	n := int(b[len(b)-1])
	if n < 1 || n > sm4Size || !bytes.Equal(b[len(b)-n:], bytes.Repeat([]byte{byte(n)}, n)) {
		clear(b)
		return nil, false
	}
	return b[:len(b)-n], true
}

func (g gcmParam) run(block cipher.Block, in []byte, encrypt bool) ([]byte, rv) {
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, ckrGeneralError
	}
	if encrypt {
		return aead.Seal(nil, g.iv, in, g.aad), ckrOK
	}
	out, err := aead.Open(nil, g.iv, in, g.aad)
	if err != nil {
		return nil, ckrEncryptedDataInvalid
	}
	return out, ckrOK
}

var (
	sm2Plain     = sm2.NewPlainEncrypterOpts(sm2.MarshalUncompressed, sm2.C1C3C2)
	sm2Encrypted = sm2.NewPlainDecrypterOpts(sm2.C1C3C2)
)

// counted counts what is read. gmsm 0.44.0 spoils a ciphertext when it has to draw k a second time, because the key stream
// came out as zeros (GB/T 32918.4-2016 §6.1 A5): by then it has overwritten the public point. That happens once in 256 times
// with one byte, and such a ciphertext decrypts to nothing; it is made anew.
type counted struct {
	r io.Reader
	n int
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += n
	return n, err
}

const sm2Scalar = 32 // bytes of k

// sm2 encrypts or decrypts with SM2 (GB/T 32918.4-2016), in the mechanism's encoding and no other.
func (c *ciphering) sm2(in []byte) (out []byte, code rv) {
	der := c.row.encoding == encDER
	var err error
	if c.encrypt {
		for {
			drawn := counted{r: rand.Reader}
			if der {
				out, err = sm2.EncryptASN1(&drawn, c.key.sm2, in)
			} else {
				out, err = sm2.Encrypt(&drawn, c.key.sm2, in, sm2Plain)
			}
			if err != nil {
				return nil, ckrGeneralError
			}
			if drawn.n < 2*sm2Scalar {
				return out, ckrOK
			}
		}
	}
	lead, opts := byte(0x04), sm2Encrypted
	if der {
		lead, opts = 0x30, sm2.ASN1DecrypterOpts
	}
	if len(in) <= sm2Overhead {
		return nil, ckrEncryptedDataLenRange
	}
	if in[0] != lead {
		return nil, ckrEncryptedDataInvalid
	}
	code, whole := c.key.secret.use(func() rv {
		if out, err = c.key.secret.sm2.Decrypt(nil, in, opts); err != nil {
			return ckrEncryptedDataInvalid
		}
		return ckrOK
	})
	if !whole {
		return nil, ckrOperationNotInitialized
	}
	return out, code
}

// crypt serves one call of an operation. room is that of the caller's buffer, CK_UNAVAILABLE_INFORMATION when he only
// asks how much he needs. Neither that question nor a buffer that is too small changes the operation.
// results: u8 1 | string, or u8 0 | u64 how much room is needed
func crypt(op **ciphering, a *appSlot, data []byte, room uint64, at part, w *builder) rv {
	c := *op
	if c == nil || !c.key.alive(c.view, a) || at == partWhole && c.updated || at != partWhole && c.row.op == opSM2Crypt {
		*op = nil
		return ckrOperationNotInitialized
	}
	most, code := c.room(len(data), at)
	if code != ckrOK {
		*op = nil
		return code
	}
	// What decrypting gives is known to be shorter only when it is there.
	if room == ckUnavailable || room < uint64(most) && (c.encrypt || at == partUpdate) {
		return tooSmall(w, most)
	}
	out, code := c.run(data, at)
	if code != ckrOK {
		*op = nil
		return code
	}
	defer clear(out)
	if uint64(len(out)) > room {
		return tooSmall(w, len(out))
	}
	if at != partUpdate {
		*op = nil
	}
	w.u8(1)
	w.string(out)
	return ckrOK
}

func tooSmall(w *builder, need int) rv {
	w.u8(0)
	w.u64(uint64(need))
	return ckrOK
}
