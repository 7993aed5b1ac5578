// Package diag keeps secrets out of what leaves the appliance for a diagnosis. It knows each secret's bytes and looks for
// them in every form that a program writes: as they are, in hexadecimal, in base64 at each of its three alignments. It is a
// second line: what is written down is chosen so that no secret is in it.
package diag

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"slices"
)

// Hidden stands where something was taken out.
const Hidden = "[已隐去 redacted]"

// minSecret is how long a secret must be to be looked for: shorter ones stand in every file by chance.
const minSecret = 6

// A Scanner knows secrets. The zero value knows none.
type Scanner struct {
	needles []needle
	short   []string
}

type needle struct {
	name  string
	bytes []byte
}

// Add has a secret looked for under a name that is no secret. Lines of it are looked for one by one, too. It keeps a copy.
func (s *Scanner) Add(name string, secret []byte) {
	secret = bytes.TrimSpace(secret)
	parts := [][]byte{secret}
	for line := range bytes.Lines(secret) {
		if line = bytes.TrimSpace(line); len(line) != len(secret) && !bytes.HasPrefix(line, []byte("-----")) {
			parts = append(parts, line)
		}
	}
	for _, p := range parts {
		if len(p) < minSecret {
			if len(p) > 0 && !slices.Contains(s.short, name) {
				s.short = append(s.short, name)
			}
			continue
		}
		for _, form := range forms(p) {
			s.needles = append(s.needles, needle{name, form})
		}
	}
}

// Short names those that are too short to be looked for.
func (s *Scanner) Short() []string { return s.short }

// Known is how many forms are looked for.
func (s *Scanner) Known() int { return len(s.needles) }

// forms are how a secret may be written.
func forms(p []byte) [][]byte {
	out := [][]byte{bytes.Clone(p), []byte(hex.EncodeToString(p)), bytes.ToUpper([]byte(hex.EncodeToString(p)))}
	// Of base64 only the characters that depend on the secret alone, whatever stands before and after it.
	for shift := range 3 {
		padded := append(make([]byte, shift), p...)
		whole := len(padded) / 3 * 3
		first := (shift + 2) / 3 * 4
		for _, e := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
			text := e.EncodeToString(padded[:whole])
			if len(text)-first >= 8 {
				out = append(out, []byte(text[first:]))
			}
		}
	}
	return out
}

// Find names the secrets that stand in data.
func (s *Scanner) Find(data []byte) []string {
	var out []string
	for _, n := range s.needles {
		if bytes.Contains(data, n.bytes) && !slices.Contains(out, n.name) {
			out = append(out, n.name)
		}
	}
	return out
}

// What looks like a secret, whoever's it is: a private key, a password in an address, a value that is called one.
var (
	privateKey = regexp.MustCompile(`(?s)-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----.*?(-----END [A-Z0-9 ]*PRIVATE KEY-----|$)`)
	inAddress  = regexp.MustCompile(`([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@"']*@`)
	bearer     = regexp.MustCompile(`(?i)\b(bearer|basic|hmac-sm3)[ =]+[A-Za-z0-9+/_.=-]{8,}`)
	called     = regexp.MustCompile(`(?i)\b(pass(?:word|wd|phrase)?|pwd|pin|secret|token|api[_-]?key|access[_-]?key)(["']?\s*[=:]\s*)("[^"\n]*"|'[^'\n]*'|[^\s,;"'}\]]+)`)
)

// looks are applied in order.
var looks = []struct {
	name string
	at   *regexp.Regexp
	with string
}{
	{"私钥 (a private key)", privateKey, Hidden},
	{"地址中的口令 (a password in an address)", inAddress, "${1}" + Hidden + "@"},
	{"凭据 (a credential)", bearer, "${1} " + Hidden},
	{"叫作口令的值 (a value that is called a secret)", called, "${1}${2}" + Hidden},
}

// Clean takes out what is a secret, and from free text what looks like one. It names what was found.
func (s *Scanner) Clean(data []byte, free bool) (clean []byte, found []string) {
	note := func(name string) {
		if !slices.Contains(found, name) {
			found = append(found, name)
		}
	}
	clean = data
	for _, n := range s.needles {
		if bytes.Contains(clean, n.bytes) {
			note(n.name)
			clean = bytes.ReplaceAll(clean, n.bytes, []byte(Hidden))
		}
	}
	if !free {
		return clean, found
	}
	for _, l := range looks {
		if l.at.Match(clean) {
			with := l.at.ReplaceAll(clean, []byte(l.with))
			if !bytes.Equal(with, clean) {
				note(l.name)
			}
			clean = with
		}
	}
	return clean, found
}
