package api_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"yinjian/api"
	"yinjian/api/wire"
	"yinjian/appliance/account"
	"yinjian/appliance/evidence"
	"yinjian/appliance/problem"
	"yinjian/appliance/sign"
)

// untouchable are services that nothing may reach: then nothing is signed, granted, stamped or looked up, and nothing is
// journalled.
func untouchable(t testing.TB) (*services, *atomic.Int64) {
	t.Helper()
	sv, reached := newServices(), new(atomic.Int64)
	internal := problem.New(problem.Internal, "x", "x")
	sv.sign = func(context.Context, *account.Application, *sign.Request) (*sign.Result, error) {
		reached.Add(1)
		return nil, internal
	}
	sv.verify = func(context.Context, *sign.VerifyRequest) (*evidence.Report, error) {
		reached.Add(1)
		return nil, internal
	}
	sv.bundle = func(context.Context, *account.Application, string) ([]byte, error) {
		reached.Add(1)
		return nil, internal
	}
	sv.authorize = func(context.Context, *account.Application, account.GrantRequest) (*account.Grant, error) {
		reached.Add(1)
		return nil, internal
	}
	sv.respond = func(context.Context, string, string, []byte) ([]byte, error) {
		reached.Add(1)
		return nil, internal
	}
	return sv, reached
}

// goodBodies are taken, and hold every field of every route between them. A field that openapi.json has and no body here
// holds fails the test: add it to one.
func goodBodies() map[string][]m {
	digest := func(alg string) m { return m{"algorithm": alg, "value": digest32} }
	byDigest := signBody()
	delete(byDigest, "content")
	byDigest["digest"] = digest("SM3")
	byDigest["consent"] = m{"authorization_id": strings.Repeat("0f", 16)}
	byDigests := authorizationBody()
	byDigests["digest_algorithm"] = "SM3"
	return map[string][]m{
		"/v1/sign":                {signBody(), byDigest},
		"/v1/batches":             {batchBody(1), batchOfDigests()},
		"/v1/verify":              {verifyBody(), {"cms": "MAA=", "digest": digest("SM3")}, {"token": "MAA="}, {"evidence": m{"format": "x"}}},
		"/v1/timestamp":           {timestampBody(), {"data": "YWJj"}},
		"/v1/stf/create-request":  {{"data": "YWJj", "req_type": 0, "hash_alg": 4}},
		"/v1/stf/create-response": {{"request": b64(stampUnit().query), "sig_alg": 131585}},
		"/v1/stf/verify":          {{"response": b64(stampUnit().response), "hash_alg": 1, "sig_alg": 131585, "certificate": b64(stampUnit().cert.Raw)}},
		"/v1/stf/info":            {{"response": b64(stampUnit().response)}},
		"/v1/stf/detail":          {{"response": b64(stampUnit().response), "item": 7}},
		"/v1/authorizations":      {byDigests, {"signer": "D1001", "pin": "1", "count": 1, "seconds": 1}},
	}
}

// A field is one of a request body, by its path: "document.id", "digests[0]".
type field struct {
	path     string
	schema   *openapi3.Schema
	required bool
}

// fieldsOf lists the fields of a schema, deepest last.
func fieldsOf(s *openapi3.Schema, path string) (out []field) {
	s = solid(s)
	if s.Items != nil {
		item := field{path + "[0]", solid(s.Items.Value), false}
		return append([]field{item}, fieldsOf(item.schema, item.path)...)
	}
	for name, ref := range s.Properties {
		at := strings.TrimPrefix(path+"."+name, ".")
		out = append(out, field{at, solid(ref.Value), slices.Contains(s.Required, name)})
		out = append(out, fieldsOf(ref.Value, at)...)
	}
	return out
}

// solid is what stands behind an allOf of one, which carries a description only.
func solid(s *openapi3.Schema) *openapi3.Schema {
	if len(s.AllOf) == 1 {
		return s.AllOf[0].Value
	}
	return s
}

const place = "@@PLACE@@"

// spoil answers the body with a literal in the place of a field.
func spoil(t *testing.T, body m, path, literal string) []byte {
	t.Helper()
	var copied m
	if err := json.Unmarshal(encode(t, body), &copied); err != nil {
		t.Fatal(err)
	}
	return []byte(strings.Replace(string(encode(t, put(copied, path, place))), `"`+place+`"`, literal, 1))
}

// valueAt is the field in the body, if that holds it.
func valueAt(body m, path string) (v any, ok bool) {
	v = body
	for _, p := range strings.FieldsFunc(path, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		switch in := v.(type) {
		case m:
			if v, ok = in[p]; !ok {
				return nil, false
			}
		case []any:
			if len(in) == 0 {
				return nil, false
			}
			v = in[0]
		default:
			return nil, false
		}
	}
	return v, true
}

// A fault is one way for a field to be wrong, as a JSON literal; at is added to the field's path in the answer.
type fault struct{ name, literal, at string }

func quoted(s string) string { b, _ := json.Marshal(s); return string(b) }

// faultsOf makes the faults that a field's schema has it refuse. had is the field's good literal.
func faultsOf(t *testing.T, f field, had string) (out []fault) {
	t.Helper()
	s := f.schema
	add := func(name, literal string) { out = append(out, fault{name, literal, ""}) }
	for name, literal := range map[string]string{
		"string": `"zz"`, "number": `7.5`, "huge": `1e400`, "true": `true`, "array": `[]`, "object": `{}`,
	} {
		isBool := s.Type.Is("boolean") && name == "true"
		if s.Type.Is(name) || isBool {
			continue
		}
		add("type "+name, literal)
	}
	add("null", "null")
	for name, literal := range map[string]string{"no value": "", "half a literal": "tru", "a comment": "/**/" + had, "single quotes": "'x'", "NaN": "NaN", "two values": had + " " + had} {
		if literal != "" || !strings.HasSuffix(f.path, "[0]") { // a list may be empty
			add(name, literal)
		}
	}
	switch {
	case s.Type.Is("string") && s.Format == "byte":
		good, err := base64.StdEncoding.DecodeString(strings.Trim(had, `"`))
		if err != nil {
			t.Fatalf("%s: %v", f.path, err)
		}
		longer := base64.StdEncoding.EncodeToString(append(good, 0))
		add("not base64", `"!!!!"`)
		add("url alphabet", quoted(strings.Repeat("-_-_", 11)))
		add("line break", quoted(had[1:3]+"\r\n"+had[3:len(had)-1]))
		add("space", quoted(had[1:3]+" "+had[3:len(had)-1]))
		add("no padding", `"YQ"`)
		add("padding within", `"YQ==YQ=="`)
		add("too much padding", `"YWJj===="`)
		add("stray bits", `"YR=="`)
		add("invalid UTF-8", "\"YW\xffj\"")
		add("full width", `"ＹＷＪｊ"`)
		if s.MinLength > 0 {
			add("empty", `""`)
		}
		if s.MaxLength != nil {
			add("a byte more", quoted(longer))
			add("a byte less", quoted(base64.StdEncoding.EncodeToString(good[1:])))
		}
	case s.Type.Is("string"):
		add("NUL", `"a\u0000b"`)
		add("control", `"a\u001fb"`)
		add("raw control", "\"a\tb\"")
		add("line end", `"a\nb"`)
		add("C1 control", `"a\u0085b"`)
		add("zero width", `"a\u200bb"`)
		add("direction turned", `"a\u202eb"`)
		add("byte order mark", `"\ufeffab"`)
		add("replacement", `"a\ufffdb"`)
		add("private use", `"a\ue000b"`)
		add("invalid UTF-8", "\"a\xffb\"")
		add("overlong UTF-8", "\"a\xc0\xafb\"")
		add("surrogate in UTF-8", "\"a\xed\xa0\x80b\"")
		add("lone surrogate", `"a\ud800b"`)
		add("lone low surrogate", `"a\udc00b"`)
		add("surrogates reversed", `"\udc00\ud800"`)
		add("half an escape", `"a\u12"`)
		add("unknown escape", `"a\x41"`)
		add("unfinished", `"a`)
		if s.MinLength > 0 || s.Pattern != "" || len(s.Enum) > 0 {
			add("empty", `""`)
		}
		if s.Format != "password" {
			add("blank", `" "`)
			add("space before", quoted(" "+strings.Trim(had, `"`)))
			add("space after", quoted(strings.Trim(had, `"`)+" "))
		}
		switch {
		case len(s.Enum) > 0:
			add("unknown", `"zzz"`)
			add("other case", map[bool]string{false: strings.ToLower(had), true: strings.ToUpper(had)}[strings.ToLower(had) == had])
			add("and more", quoted(strings.Trim(had, `"`)+"x"))
		case s.Pattern != "":
			add("too long", quoted(strings.Repeat("0", 1000)))
			add("a letter outside", quoted("院"+strings.Trim(had, `"`)))
			if path := "../../etc/passwd"; !regexp.MustCompile(s.Pattern).MatchString(path) { // a key may be any visible characters
				add("a path", quoted(path))
			}
		case s.MaxLength != nil:
			add("a byte too long", quoted(strings.Repeat("x", int(*s.MaxLength)+1)))
			add("too long in bytes", quoted(strings.Repeat("院", int(*s.MaxLength)/3+1)))
			add("a mebibyte", quoted(strings.Repeat("x", 32<<10)))
		default:
			t.Errorf("%s: a text without an enum, a pattern or a longest length", f.path)
		}
	case s.Type.Is("integer"):
		if s.Min == nil || s.Max == nil {
			t.Fatalf("%s: an integer without bounds", f.path)
		}
		for _, literal := range []string{
			"1.0", "1e1", "01", "+1", "-0", "0x1", ".5", "1.", "-", "1_0", "99999999999999999999999", "2147483648", "-9223372036854775809", `"1"`, "true",
			fmt.Sprint(*s.Min - 1), fmt.Sprint(*s.Max + 1), fmt.Sprint(-*s.Max),
		} {
			add(literal, literal)
		}
	case s.Type.Is("boolean"):
		for _, literal := range []string{`"true"`, "0", "1", "True", "yes", `""`} {
			add(literal, literal)
		}
	case s.Type.Is("array"):
		one := strings.TrimSuffix(strings.TrimPrefix(had, "["), "]")
		if s.MaxItems == nil {
			t.Fatalf("%s: an array without bounds", f.path)
		}
		add("one too many", "["+strings.Repeat(one+",", int(*s.MaxItems))+one+"]")
		add("very many", "["+strings.Repeat(`"",`, 10_000)+`""]`)
		if s.MinItems > 0 {
			add("none", "[]")
		}
		add("comma after", "["+one+",]")
		add("comma before", "[,"+one+"]")
		add("not closed", "["+one)
	case s.Type.Is("object"):
		inner := strings.TrimSuffix(strings.TrimPrefix(had, "{"), "}")
		if s.AdditionalProperties.Has == nil || !*s.AdditionalProperties.Has {
			out = append(out, fault{"unknown field", "{" + inner + `,"surplus":1}`, ".surplus"})
		}
		out = append(out, fault{"a field twice", `{"surplus":1,"surplus":1,` + inner + `}`, ".surplus"})
		add("comma after", "{"+inner+",}")
		add("name without quotes", "{a:1}")
		add("name alone", `{"a"}`)
		add("invalid UTF-8 in a name", "{\"a\xff\":1}")
		if s.AdditionalProperties.Has != nil && *s.AdditionalProperties.Has {
			for name, open := range map[string]string{"deep array": "[", "deep object": `{"a":`} {
				out = append(out, fault{name, `{"a":` + strings.Repeat(open, 10_000), ".a"})
			}
			out = append(out, fault{"broad", `{"a":[` + strings.Repeat("1,", 10_000) + "1]}", ".a"}, fault{"lone surrogate", `{"a":"\ud800"}`, ".a"})
		}
	default:
		t.Errorf("%s: a field of type %v has no faults here", f.path, s.Type)
	}
	return out
}

// TestBadInput makes, from openapi.json, each field of each route wrong in each way that its schema refuses. The answer
// names the field and says what to do; nothing reaches a service.
func TestBadInput(t *testing.T) {
	t.Parallel()
	sv, reached := untouchable(t)
	k := startWith(t, sv, func(c *api.Config, _ *http.Server) { c.Limits.Rate = func(*appT) (int, int) { return 10_000, 100_000 } })
	good := startWith(t, newServices())
	wrong := func(t *testing.T, path string, body []byte, want string) {
		t.Helper()
		parent := want[:max(0, strings.LastIndex(want, "."))]
		got := k.do(call{path: path, body: body})
		code := problem.Code(got.problem.Code)
		if code != problem.InvalidRequest && code != problem.ContentRequired && !(code == problem.NotFound && want == "unit") {
			t.Errorf("answer = %d %s to %.200q", got.status, got.body, body)
			return
		}
		wantProblem(t, got, got.status, code, got.problem.Field)
		// An element may be called by its list, what is inside by its own name, and where it is no JSON any more the object
		// around it, with the place.
		name, syntax := got.problem.Field, strings.HasPrefix(got.problem.Detail, "JSON")
		if name != want && name != strings.TrimSuffix(want, "[0]") && !strings.HasPrefix(name, want+".") && !strings.HasPrefix(name, want+"[") && !(syntax && name == parent) {
			t.Errorf("answer names %q, want %q: %s to %.300q", name, want, got.problem.Detail, body)
		}
		if got.problem.Retry != wire.RetryNever {
			t.Errorf("retry %s: %s", got.problem.Retry, got.body)
		}
	}
	doc := document(t)
	routes := 0
	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			if operation.RequestBody == nil {
				continue
			}
			content := operation.RequestBody.Value.Content.Get("application/json")
			if content == nil {
				continue // a TimeStampReq, which package tsa answers with a rejection
			}
			routes++
			bodies := goodBodies()[path]
			for i, body := range bodies {
				if got := good.do(call{method: method, path: path, body: encode(t, body)}); got.status/100 == 4 {
					t.Errorf("%s: good body %d is refused: %s", path, i, got.body)
				}
			}
			for _, f := range fieldsOf(content.Schema.Value, "") {
				i := slices.IndexFunc(bodies, func(b m) bool { _, ok := valueAt(b, f.path); return ok })
				if i < 0 {
					t.Errorf("%s %s: no good body holds %s: add it to goodBodies", method, path, f.path)
					continue
				}
				body := bodies[i]
				v, _ := valueAt(body, f.path)
				had := string(encode(t, v))
				t.Run(path+"/"+f.path, func(t *testing.T) {
					faults := faultsOf(t, f, had)
					if len(faults) < 10 {
						t.Errorf("%d faults only", len(faults))
					}
					for _, x := range faults {
						wrong(t, path, spoil(t, body, f.path, x.literal), f.path+x.at)
					}
					if strings.HasSuffix(f.path, "[0]") {
						return
					}
					name := f.path[strings.LastIndex(f.path, ".")+1:]
					wrong(t, path, spoil(t, body, f.path, had+`,"`+name+`":`+had), f.path)
					wrong(t, path, spoil(t, body, f.path, fmt.Sprintf(`%s,"\u%04x%s":%s`, had, name[0], name[1:], had)), f.path)
					wrong(t, path, spoil(t, body, f.path, had+`,"`+strings.ToUpper(name)+`":`+had), strings.TrimSuffix(f.path, name)+strings.ToUpper(name))
					if f.required {
						got := k.do(call{path: path, body: encode(t, without(t, body, f.path))})
						wantProblem(t, got, 400, problem.InvalidRequest, got.problem.Field)
						if name := got.problem.Field; name != f.path && !strings.HasPrefix(name, f.path+".") {
							t.Errorf("without %s, the answer names %q", f.path, name)
						}
					}
				})
			}
			text := string(encode(t, bodies[0]))
			for name, body := range map[string]string{
				"empty": "", "blank": " \n", "null": "null", "array": "[]", "text": `"x"`, "number": "1", "true": "true", "BOM": "\ufeff" + text,
				"UTF-16": "\xff\xfe{\x00}\x00", "trailing": text + "1", "trailing bracket": text + "}", "two": text + text, "lines": text + "\n" + text,
				"NUL after": text + "\x00", "NUL before": "\x00" + text, "cut": text[:len(text)-1], "half": text[:len(text)/2], "comma": text[:len(text)-1] + ",}",
				"no names": "{1:2}", "deep": strings.Repeat("[", 60_000), "deep objects": strings.Repeat(`{"a":`, 12_000), "form": "signer=D1&algorithm=SM2",
				"XML": "<sign/>", "unknown": `{"surplus":` + text + `}`, "empty name": `{"":1}`, "a thousand unknown": `{` + strings.Repeat(`"a":1,`, 1000) + `"b":1}`,
			} {
				t.Run(path+"/body "+name, func(t *testing.T) {
					got := k.do(call{path: path, body: []byte(body)})
					wantProblem(t, got, 400, problem.InvalidRequest, got.problem.Field)
					if len(got.problem.Field) > 100 {
						t.Errorf("field %q", got.problem.Field)
					}
				})
			}
		}
	}
	if routes != len(goodBodies()) {
		t.Errorf("%d routes take JSON, %d have good bodies", routes, len(goodBodies()))
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("%d faulty requests reached a service", n)
	}
}

// without is the body less a field.
func without(t *testing.T, body m, path string) m {
	t.Helper()
	var copied m
	if err := json.Unmarshal(encode(t, body), &copied); err != nil {
		t.Fatal(err)
	}
	return put(copied, path, absent)
}

func document(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromFile("openapi.json")
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// TestBadRequests makes what surrounds the body wrong, on every route: media type, coding, query, parameters.
func TestBadRequests(t *testing.T) {
	t.Parallel()
	sv, reached := untouchable(t)
	k := startWith(t, sv)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	_, _ = z.Write(encode(t, signBody()))
	z.Close()
	for path, item := range document(t).Paths.Map() {
		for method, operation := range item.Operations() {
			if operation.Security != nil && len(*operation.Security) == 0 {
				continue // open to all, without parameters
			}
			at, body, media := strings.NewReplacer("{id}", record, "{serial}", "01ab", "{unit}", "sm2").Replace(path), []byte(nil), ""
			if operation.RequestBody != nil {
				for media = range operation.RequestBody.Value.Content {
				}
				body = []byte{0x30, 0}
				if bodies := goodBodies()[path]; bodies != nil {
					body = encode(t, bodies[0])
				}
			}
			refused := func(name string, c call, status int, code problem.Code, field string) {
				t.Helper()
				t.Run(method+" "+path+"/"+name, func(t *testing.T) {
					c.method = method
					if c.path == "" {
						c.path = at
					}
					if c.body == nil {
						c.body = body
					}
					inner := c.tamper
					c.tamper = func(r *http.Request) {
						if media != "" && len(r.Header.Values("Content-Type")) == 1 && c.header["Content-Type"] == "" {
							r.Header.Set("Content-Type", media)
						}
						if inner != nil {
							inner(r)
						}
					}
					wantProblem(t, k.do(c), status, code, field)
				})
			}
			header := func(name string, values ...string) call {
				return call{tamper: func(r *http.Request) { r.Header[name] = values }}
			}
			refused("unsigned", call{unsigned: true}, 401, problem.Unauthenticated, "header.Authorization")
			refused("query", call{path: at + "?a=1"}, 400, problem.InvalidRequest, "query")
			refused("XML wanted", header("Accept", "application/xml"), 406, "not_acceptable", "")
			refused("nothing wanted", header("Accept", "*/*;q=0"), 406, "not_acceptable", "")
			if media == "" {
				refused("a body", call{body: []byte("{}")}, 413, problem.TooLarge, "")
			} else {
				for name, c := range map[string]call{
					"no type": header("Content-Type"), "empty type": header("Content-Type", ""), "text": header("Content-Type", "text/plain"),
					"form": header("Content-Type", "application/x-www-form-urlencoded"), "multipart": header("Content-Type", "multipart/form-data; boundary=x"),
					"type of another": header("Content-Type", "application/timestamp-reply"), "two types": header("Content-Type", media, media),
					"two types in one": header("Content-Type", media+", text/plain"), "type's parameter": header("Content-Type", media+"; profile=x"),
					"GBK": header("Content-Type", media+"; charset=gbk"), "UTF-16": header("Content-Type", media+"; charset=utf-16"),
					"half a parameter": header("Content-Type", media+"; charset"), "two charsets": header("Content-Type", media+"; charset=utf-8; charset=gbk"),
					"gzip":    {body: zipped.Bytes(), tamper: func(r *http.Request) { r.Header.Set("Content-Encoding", "gzip") }},
					"deflate": header("Content-Encoding", "deflate"), "br": header("Content-Encoding", "br"),
					"coded twice": header("Content-Encoding", "identity", "gzip"), "coded, in a list": header("Content-Encoding", "identity, gzip"),
				} {
					refused(name, c, 415, "unsupported_media_type", "")
				}
			}
			for _, p := range operation.Parameters {
				schema := p.Value.Schema.Value
				if schema.Pattern == "" {
					t.Errorf("%s %s: parameter %s has no pattern", method, path, p.Value.Name)
				}
				switch p.Value.In {
				case "path":
					field := "path." + p.Value.Name
					for _, v := range []string{"..%2f..", "%00", "a%20b", "é", "%e9", "'", "*", strings.Repeat("0", 200), "%ff", "{" + p.Value.Name + "}"} {
						raw := strings.Replace(path, "{"+p.Value.Name+"}", v, 1)
						if _, err := url.PathUnescape(raw); err != nil {
							t.Fatal(err)
						}
						status, code := 400, problem.InvalidRequest
						if p.Value.Name == "unit" {
							status, code = 404, problem.NotFound
						}
						refused(p.Value.Name+"="+v, call{path: raw}, status, code, field)
					}
				case "header":
					field := "header." + p.Value.Name
					for _, values := range [][]string{nil, {""}, {"a b"}, {"a\tb"}, {"é"}, {"键"}, {strings.Repeat("k", 129)}, {"a", "b"}, {"a", "a"}} {
						refused(fmt.Sprintf("%s=%.20q", p.Value.Name, values), header(p.Value.Name, values...), 400, problem.InvalidRequest, field)
					}
				default:
					t.Errorf("%s %s: a parameter in the %s has no cases here", method, path, p.Value.In)
				}
			}
		}
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("%d faulty requests reached a service", n)
	}
}
