package problem_test

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"yinjian/appliance/problem"
)

func TestProblem(t *testing.T) {
	t.Parallel()
	cause := errors.New("disk gone")
	p := problem.Invalid("document.id", "须为 %d 字节 (bytes)", 3)
	with := p.With(cause)
	if p.Err != nil || with.Err != cause || with == p {
		t.Errorf("With changed its receiver: %v, %v", p.Err, with.Err)
	}
	if want := "invalid_request (document.id): 须为 3 字节 (bytes): disk gone"; with.Error() != want {
		t.Errorf("Error() = %q, want %q", with.Error(), want)
	}
	wrapped := fmt.Errorf("signing: %w", with)
	var found *problem.Problem
	if !errors.As(wrapped, &found) || !errors.Is(wrapped, cause) {
		t.Error("a wrapped problem hides itself or its cause")
	}
	for want, err := range map[problem.Code]error{
		problem.InvalidRequest: wrapped, problem.Internal: cause, "": nil, problem.PINLocked: problem.New(problem.PINLocked, "", ""),
	} {
		if got := problem.CodeOf(err); got != want {
			t.Errorf("CodeOf(%v) = %q, want %q", err, got, want)
		}
	}
}

// Clients switch on codes: no two may be the same, and each is lower case with underscores.
func TestCodes(t *testing.T) {
	t.Parallel()
	file, err := parser.ParseFile(token.NewFileSet(), "problem.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		if id, ok := spec.Type.(*ast.Ident); ok && id.Name == "Code" {
			value := spec.Values[0].(*ast.BasicLit).Value
			if other, twice := seen[value]; twice {
				t.Errorf("%s and %s are both %s", other, spec.Names[0].Name, value)
			}
			if strings.Trim(value, `"abcdefghijklmnopqrstuvwxyz_`) != "" {
				t.Errorf("%s = %s", spec.Names[0].Name, value)
			}
			seen[value] = spec.Names[0].Name
		}
		return true
	})
	if len(seen) < 25 {
		t.Errorf("%d codes found in the source", len(seen))
	}
}

func TestCheckText(t *testing.T) {
	t.Parallel()
	for value, want := range map[string]bool{
		"心血管内科":                    true,
		"a":                        true,
		strings.Repeat("科", 21):    true, // 63 bytes
		strings.Repeat("科", 22):    false,
		strings.Repeat("x", 64):    true,
		strings.Repeat("x", 65):    false,
		"阿卜杜热西提·买买提 (主任)":          true,
		"𠮷田":                       true, // beyond the basic plane
		"":                         false,
		" ":                        false,
		"a ":                       false,
		"　科":                       false, // U+3000
		"a\nb":                     false,
		"a\tb":                     false,
		"a\x00":                    false,
		"a\x7f":                    false,
		"a\u0085b":                 false, // C1: NEXT LINE
		"a\u202eb":                 false, // RIGHT-TO-LEFT OVERRIDE
		"a\u2066b":                 false,
		"a\u2028b":                 false,
		"a\u2029b":                 false,
		"a\ufffdb":                 false,
		"a\xffb":                   false,
		"\xed\xa0\x80":             false, // a surrogate
		string([]byte{0xc3, 0x28}): false,
		"བསོད་ནམས་":                true, // Tibetan, with combining vowels
		"ئابدۇ" + "\u0670":         true, // Uyghur, with a combining mark
		"e\u0301":                  true, // not NFC
		"李　明":                      true, // U+3000 inside
		"\ue000":                   false,
		"李\ufeff明":                 false,
	} {
		err := problem.CheckText("f", value, 64)
		if (err == nil) != want {
			t.Errorf("CheckText(%q) = %v, want fine: %v", value, err, want)
		}
		if err != nil && problem.CodeOf(err) != problem.InvalidRequest {
			t.Errorf("CheckText(%q): code %s", value, problem.CodeOf(err))
		}
	}
}

// The list is Unicode's DerivedCoreProperties (Default_Ignorable_Code_Point) and its spaces, by number.
func TestMisleads(t *testing.T) {
	t.Parallel()
	for _, r := range [][2]rune{
		{0x00, 0x1f}, {0x7f, 0xa0}, {0xad, 0xad}, {0x34f, 0x34f}, {0x61c, 0x61c}, {0x115f, 0x1160}, {0x1680, 0x1680}, {0x17b4, 0x17b5},
		{0x180b, 0x180f}, {0x2000, 0x200f}, {0x2028, 0x202f}, {0x205f, 0x206f}, {0x2800, 0x2800}, {0x3164, 0x3164}, {0xd800, 0xf8ff},
		{0xfdd0, 0xfdef}, {0xfe00, 0xfe0f}, {0xfeff, 0xfeff}, {0xffa0, 0xffa0}, {0xfff0, 0xfffb}, {0xfffd, 0xffff}, {0x1bca0, 0x1bca3},
		{0x1d173, 0x1d17a}, {0xe0000, 0xe0fff}, {0xf0000, 0x10ffff},
	} {
		for c := r[0]; c <= r[1]; c++ {
			if !problem.Misleads(c) {
				t.Errorf("%U may stand in evidence", c)
			}
		}
	}
	for _, s := range []string{"abcXYZ 0-9 ~!", "　李明·（主任）", "𠮷㐂", "ཀྲཱི", "ئۇيغۇر\u064e", "ᠮᠣᠩᠭᠣᠯ", "ꆈꌠ", "é\u0301\u0f71"} {
		for _, c := range s {
			if problem.Misleads(c) {
				t.Errorf("%U of %q is refused", c, s)
			}
		}
	}
}

// TestMisleadsByTables: what Misleads answers without the tables is what Unicode's say, for every code point.
func TestMisleadsByTables(t *testing.T) {
	t.Parallel()
	for r := rune(0); r <= unicode.MaxRune; r++ {
		want := r != ' ' && r != '\u3000' && (r == utf8.RuneError || r == '\u2800' || unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Cs,
			unicode.Z, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector, unicode.Noncharacter_Code_Point))
		if got := problem.Misleads(r); got != want {
			t.Errorf("Misleads(%U) = %v, want %v", r, got, want)
		}
	}
}
