package source

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	beevik "github.com/beevik/ntp"
	"github.com/emmansun/gmsm/cbcmac"
)

// Auth names the symmetric key shared with a server (RFC 5905 §7.3 MAC, RFC 8573 for AES-CMAC).
//
// A wrong key looks like a silent server: chrony drops what it cannot verify.
type Auth struct {
	KeyID uint32
	// Type is "SHA256", "AES128" or "AES256", the last two being CMAC. MD5 and SHA1 are refused.
	Type string
	// KeyFile is in chrony's format (chrony.conf(5), keyfile): lines of "id type key", key as HEX:… or ASCII:…. Nobody but
	// owner and group may have access to it.
	KeyFile string
}

// maxKeyFile is far more than any key file needs.
const maxKeyFile = 64 << 10

var authTypes = map[string]struct {
	typ      beevik.AuthType
	min, max int // key size in bytes
	mac      func(key, packet []byte) []byte
}{
	// Fewer than 16 bytes can be searched; more than 32 beevik would cut off unasked.
	"SHA256": {beevik.AuthSHA256, 16, 32, sha256MAC},
	"AES128": {beevik.AuthAES128, 16, 16, aesCMAC},
	"AES256": {beevik.AuthAES256, 32, 32, aesCMAC},
}

// sha256MAC is RFC 5905 §7.3 with SHA-256, cut to the 20 bytes that version 4 has room for.
func sha256MAC(key, packet []byte) []byte {
	h := sha256.New()
	h.Write(key)
	h.Write(packet)
	return h.Sum(nil)[:20]
}

// aesCMAC is RFC 8573.
func aesCMAC(key, packet []byte) []byte {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the size was checked when the key was loaded
	}
	return cbcmac.NewCMAC(block, block.BlockSize()).MAC(packet)
}

// authentic reports whether packet ends with the right MAC of the key id. beevik looks at one packet alone, and the
// question would be lost on the first that somebody on the way has made.
func (a Auth) authentic(key, packet []byte) bool {
	mac := authTypes[a.Type].mac
	size := len(mac(key, nil))
	if len(packet) < headerSize+4+size || len(packet)%4 != 0 {
		return false
	}
	body, tail := packet[:len(packet)-4-size], packet[len(packet)-4-size:]
	return binary.BigEndian.Uint32(tail) == a.KeyID && subtle.ConstantTimeCompare(tail[4:], mac(key, body)) == 1
}

// load reads the key: as beevik wants it, and as it is.
func (a Auth) load() (beevik.AuthOptions, []byte, error) {
	kind, ok := authTypes[a.Type]
	if !ok {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth type %q: want SHA256, AES128 or AES256", a.Type)
	}
	if a.KeyID == 0 || a.KeyFile == "" {
		return beevik.AuthOptions{}, nil, errors.New("auth: key id and key file are required")
	}
	f, err := os.Open(a.KeyFile)
	if err != nil {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: %w", err)
	}
	if info.Mode().Perm()&0o007 != 0 {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: key file %s is open to others (mode %v)", a.KeyFile, info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: %w", err)
	}
	key, err := findKey(text, a.KeyID, a.Type)
	if err != nil {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: key file %s: %w", a.KeyFile, err)
	}
	if len(key) < kind.min || len(key) > kind.max {
		return beevik.AuthOptions{}, nil, fmt.Errorf("auth: key %d has %d bytes, %s wants %d to %d", a.KeyID, len(key), a.Type, kind.min, kind.max)
	}
	return beevik.AuthOptions{Type: kind.typ, KeyID: a.KeyID, Key: "HEX:" + hex.EncodeToString(key)}, key, nil
}

// findKey looks id up in a key file. Errors never quote the file: it is secret.
func findKey(text []byte, id uint32, typ string) ([]byte, error) {
	if len(text) > maxKeyFile {
		return nil, fmt.Errorf("larger than %d bytes", maxKeyFile)
	}
	var found []byte
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, maxKeyFile+1)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.ContainsRune("#!;%", rune(line[0])) {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) != 3 {
			return nil, fmt.Errorf("line %d: want id, type and key", n)
		}
		got, err := strconv.ParseUint(fields[0], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("line %d: key id is not a number", n)
		}
		if uint32(got) != id {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("line %d: key %d occurs twice", n, id)
		}
		if fields[1] != typ {
			return nil, fmt.Errorf("line %d: key %d is not of type %s", n, id, typ)
		}
		switch kind, value, _ := strings.Cut(fields[2], ":"); kind {
		case "HEX":
			if found, err = hex.DecodeString(value); err != nil {
				return nil, fmt.Errorf("line %d: key is not hexadecimal", n)
			}
		case "ASCII":
			found = []byte(value)
		default:
			return nil, fmt.Errorf("line %d: key must begin with HEX: or ASCII:", n)
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("line %d: key is empty", n)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if found == nil {
		return nil, fmt.Errorf("key %d not found", id)
	}
	return found, nil
}
