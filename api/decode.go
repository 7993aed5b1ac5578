package api

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"yinjian/appliance/problem"
)

const (
	maxDepth    = 16    // levels of objects and arrays; a bundle has 4
	maxMembers  = 1000  // of one object
	maxElements = 10000 // of one array
)

// decode reads one JSON value (RFC 8259) into dst, a pointer to a wire struct, more strictly than encoding/json, and
// names the field at fault:
//
//   - names match in exact case; unknown and repeated names are refused, as is null, and an empty text or a zero where
//     the field could have been left out;
//   - text must be valid UTF-8 without lone surrogates, and without characters that mislead the eye
//     ([problem.Misleads]), because it will be read in evidence;
//   - byte strings are base64 as RFC 4648 §4 has it, padded, without line breaks or stray bits;
//   - nothing but white space follows, and depth and breadth are bounded.
//
// A json.RawMessage takes an object that obeys the same rules except the characters of its texts, which are its own
// reader's affair. What decode takes, encoding/json takes and understands alike (FuzzDecode).
func decode(data []byte, dst any) *problem.Problem { return decodeInto(data, dst, nil) }

// decodeInto is decode, and puts byte strings into room as far as it goes: they are the caller's for as long as room is.
func decodeInto(data []byte, dst any, room []byte) *problem.Problem {
	d := &decoder{data: data, room: room}
	if p := d.value(reflect.ValueOf(dst).Elem(), ""); p != nil {
		return p
	}
	if d.space(); d.pos != len(d.data) {
		return problem.Invalid("", "JSON 之后还有多余数据 (data after the JSON value, at byte %d)", d.pos)
	}
	return nil
}

type decoder struct {
	data  []byte
	pos   int
	depth int
	room  []byte // for byte strings; what it is too short for has memory of its own
}

var rawMessage = reflect.TypeFor[json.RawMessage]()

func (d *decoder) value(v reflect.Value, path string) *problem.Problem {
	d.space()
	c := d.peek()
	switch {
	case c == 'n' && d.literal("null"):
		return problem.Invalid(path, "不接受 null,不适用的字段请省略 (null is refused: leave the field out)")
	case v.Type() == rawMessage:
		from := d.pos
		if c != '{' {
			return problem.Invalid(path, "应为对象 (want an object)")
		}
		if p := d.skip(path); p != nil {
			return p
		}
		v.SetBytes(d.data[from:d.pos])
		return nil
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		return d.value(v.Elem(), path)
	case reflect.Struct:
		return d.object(v, path)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			return d.bytes(v, path)
		}
		v.Set(reflect.MakeSlice(v.Type(), 0, 0)) // given and empty is not left out
		return d.array(path, func(i int) *problem.Problem {
			v.Set(reflect.Append(v, reflect.Zero(v.Type().Elem())))
			return d.value(v.Index(i), fmt.Sprintf("%s[%d]", path, i))
		})
	case reflect.String:
		s, p := d.text(path)
		if p != nil {
			return p
		}
		if i := strings.IndexFunc(s, problem.Misleads); i >= 0 {
			return problem.Invalid(path, "含有控制或不可见字符 (control, invisible or private character, or an odd space, at byte %d)", i)
		}
		v.SetString(s)
		return nil
	case reflect.Bool:
		switch {
		case d.literal("true"):
			v.SetBool(true)
		case d.literal("false"):
		default:
			return problem.Invalid(path, "应为 true 或 false (want true or false)")
		}
		return nil
	case reflect.Int:
		s, p := d.number(path)
		if p != nil {
			return p
		}
		n, err := strconv.ParseInt(string(s), 10, 32) // every integer we take fits easily
		if err != nil || string(s) == "-0" {
			return problem.Invalid(path, "应为整数 (want an integer)")
		}
		v.SetInt(n)
		return nil
	}
	panic("api: wire type not decodable: " + v.Type().String()) // every wire type is decoded in a test
}

func (d *decoder) object(v reflect.Value, path string) *problem.Problem {
	var seen uint64
	return d.members(path, func(name string) *problem.Problem {
		at := join(path, name)
		i := fieldOf(v.Type(), name)
		if i < 0 {
			return problem.Invalid(at, "未知字段 (unknown field)")
		}
		if seen&(1<<i) != 0 {
			return problem.Invalid(at, "字段重复 (field given twice)")
		}
		seen |= 1 << i
		if p := d.value(v.Field(i), at); p != nil {
			return p
		}
		// It could not be told from a field that was left out.
		if f := v.Field(i); (f.Kind() == reflect.String || f.Kind() == reflect.Int) && f.IsZero() && strings.HasSuffix(v.Type().Field(i).Tag.Get("json"), ",omitempty") {
			return problem.Invalid(at, "不能为空或 0,不适用的字段请省略 (empty or 0: leave the field out)")
		}
		return nil
	})
}

func fieldOf(t reflect.Type, name string) int {
	for i := range t.NumField() {
		if tag, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ","); tag == name && tag != "-" {
			return i
		}
	}
	return -1
}

// join is the path of a member; a name is shown only as far as it can be somebody's field.
func join(path, name string) string {
	if len(name) > 40 || strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' }) {
		name = "?"
	}
	if path == "" {
		return name
	}
	return path + "." + name
}

// members calls f after each name and colon; f consumes the value.
func (d *decoder) members(path string, f func(name string) *problem.Problem) *problem.Problem {
	if d.space(); d.peek() != '{' {
		return problem.Invalid(path, "应为对象 (want an object)")
	}
	return d.sequence('}', maxMembers, path, func(int) *problem.Problem {
		if d.space(); d.peek() != '"' {
			return d.syntax(path)
		}
		name, p := d.text(path)
		if p != nil {
			return p
		}
		if d.space(); d.peek() != ':' {
			return d.syntax(path)
		}
		d.pos++
		return f(name)
	})
}

func (d *decoder) array(path string, f func(i int) *problem.Problem) *problem.Problem {
	if d.space(); d.peek() != '[' {
		return problem.Invalid(path, "应为数组 (want an array)")
	}
	return d.sequence(']', maxElements, path, f)
}

// sequence reads from the opening bracket to the closing one.
func (d *decoder) sequence(closing byte, most int, path string, f func(i int) *problem.Problem) *problem.Problem {
	d.pos++
	if d.depth++; d.depth > maxDepth {
		return problem.Invalid(path, "嵌套超过 %d 层 (nested deeper than %d)", maxDepth, maxDepth)
	}
	defer func() { d.depth-- }()
	if d.space(); d.peek() == closing {
		d.pos++
		return nil
	}
	for i := 0; ; i++ {
		if i == most {
			return problem.Invalid(path, "成员超过 %d 个 (more than %d members)", most, most)
		}
		if p := f(i); p != nil {
			return p
		}
		d.space()
		switch d.peek() {
		case ',':
			d.pos++
		case closing:
			d.pos++
			return nil
		default:
			return d.syntax(path)
		}
	}
}

// skip reads any value and checks its form.
func (d *decoder) skip(path string) *problem.Problem {
	d.space()
	switch c := d.peek(); {
	case c == '{':
		seen := map[string]bool{}
		return d.members(path, func(name string) *problem.Problem {
			at := join(path, name)
			if seen[name] {
				return problem.Invalid(at, "字段重复 (field given twice)")
			}
			seen[name] = true
			return d.skip(at)
		})
	case c == '[':
		return d.array(path, func(int) *problem.Problem { return d.skip(path) })
	case c == '"':
		_, p := d.text(path)
		return p
	case c == '-' || '0' <= c && c <= '9':
		_, p := d.number(path)
		return p
	case d.literal("true"), d.literal("false"), d.literal("null"):
		return nil
	}
	return d.syntax(path)
}

func (d *decoder) bytes(v reflect.Value, path string) *problem.Problem {
	s, p := d.quoted(path)
	if p != nil {
		return p
	}
	most := base64.StdEncoding.DecodedLen(len(s))
	var out []byte
	if 0 < most && most <= len(d.room) { // what is given and empty is not left out
		out, d.room = d.room[:most:most], d.room[most:]
	} else {
		out = make([]byte, most)
	}
	// The package skips line breaks even when strict.
	n, err := base64.StdEncoding.Strict().Decode(out, s)
	if err != nil || base64.StdEncoding.EncodedLen(n) != len(s) {
		return problem.Invalid(path, "不是规范的 base64 (not canonical base64, RFC 4648 section 4, padded, without line breaks)")
	}
	v.SetBytes(out[:n])
	return nil
}

func (d *decoder) text(path string) (string, *problem.Problem) {
	b, p := d.quoted(path)
	if p == nil && !utf8.Valid(b) {
		return "", problem.Invalid(path, "不是合法的 UTF-8 (not valid UTF-8)")
	}
	return string(b), p
}

// quoted reads a string and undoes its escapes. The answer may share memory with the input.
func (d *decoder) quoted(path string) ([]byte, *problem.Problem) {
	if d.peek() != '"' {
		return nil, problem.Invalid(path, "应为字符串 (want a string)")
	}
	d.pos++
	from := d.pos
	for d.pos < len(d.data) {
		switch c := d.data[d.pos]; {
		case c == '"':
			d.pos++
			return d.data[from : d.pos-1], nil
		case c == '\\':
			return d.unescape(from, path)
		case c < ' ':
			return nil, d.syntax(path)
		default:
			d.pos++
		}
	}
	return nil, d.syntax(path)
}

// unescape goes on from the first backslash of a string that began at from.
func (d *decoder) unescape(from int, path string) ([]byte, *problem.Problem) {
	out := append([]byte(nil), d.data[from:d.pos]...)
	for d.pos < len(d.data) {
		c := d.data[d.pos]
		switch {
		case c == '"':
			d.pos++
			return out, nil
		case c < ' ':
			return nil, d.syntax(path)
		case c != '\\':
			out = append(out, c)
			d.pos++
			continue
		}
		if d.pos+1 >= len(d.data) {
			return nil, d.syntax(path)
		}
		d.pos += 2
		switch e := d.data[d.pos-1]; e {
		case '"', '\\', '/':
			out = append(out, e)
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, ok := d.hex4()
			if utf16.IsSurrogate(r) {
				low := rune(-1)
				if ok && d.literal(`\u`) {
					low, ok = d.hex4()
				}
				if r = utf16.DecodeRune(r, low); r == utf8.RuneError {
					return nil, problem.Invalid(path, "含有不成对的代理字符 (lone surrogate)")
				}
			}
			if !ok {
				return nil, d.syntax(path)
			}
			out = utf8.AppendRune(out, r)
		default:
			return nil, d.syntax(path)
		}
	}
	return nil, d.syntax(path)
}

func (d *decoder) hex4() (rune, bool) {
	if d.pos+4 > len(d.data) {
		return 0, false
	}
	n, err := strconv.ParseUint(string(d.data[d.pos:d.pos+4]), 16, 16)
	if err != nil {
		return 0, false
	}
	d.pos += 4
	return rune(n), true
}

// number reads RFC 8259 §6 and answers its text.
func (d *decoder) number(path string) ([]byte, *problem.Problem) {
	from := d.pos
	if d.peek() == '-' {
		d.pos++
	}
	if d.peek() == '0' {
		d.pos++
	} else if d.digits() == 0 {
		if d.pos == from {
			return nil, problem.Invalid(path, "应为数字 (want a number)")
		}
		return nil, d.syntax(path)
	}
	if d.peek() == '.' {
		d.pos++
		if d.digits() == 0 {
			return nil, d.syntax(path)
		}
	}
	if c := d.peek(); c == 'e' || c == 'E' {
		d.pos++
		if c := d.peek(); c == '+' || c == '-' {
			d.pos++
		}
		if d.digits() == 0 {
			return nil, d.syntax(path)
		}
	}
	return d.data[from:d.pos], nil
}

func (d *decoder) digits() (n int) {
	for c := d.peek(); '0' <= c && c <= '9'; c = d.peek() {
		d.pos++
		n++
	}
	return n
}

func (d *decoder) literal(s string) bool {
	if d.pos+len(s) <= len(d.data) && string(d.data[d.pos:d.pos+len(s)]) == s {
		d.pos += len(s)
		return true
	}
	return false
}

// peek is the next byte, or 0 at the end (which is no JSON token).
func (d *decoder) peek() byte {
	if d.pos < len(d.data) {
		return d.data[d.pos]
	}
	return 0
}

func (d *decoder) space() {
	for d.pos < len(d.data) {
		switch d.data[d.pos] {
		case ' ', '\t', '\r', '\n':
			d.pos++
		default:
			return
		}
	}
}

func (d *decoder) syntax(path string) *problem.Problem {
	if d.pos >= len(d.data) {
		return problem.Invalid(path, "JSON 不完整 (the JSON ends too early)").With(errors.New("truncated"))
	}
	return problem.Invalid(path, "JSON 语法错误 (JSON syntax error at byte %d)", d.pos)
}
