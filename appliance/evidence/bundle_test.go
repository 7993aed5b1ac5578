package evidence_test

import (
	"bytes"
	"crypto"
	"encoding/json"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/emmansun/gmsm/smx509"
	"github.com/google/go-cmp/cmp"

	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
)

func TestParse(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	data := w.Evidence(w.app, w.Sign(w.app, request("a", kinds[0])).RecordID)
	b := parse(t, data)
	if again := encode(t, b); !bytes.Equal(again, data) {
		t.Errorf("encodes to %s, was %s", again, data)
	}
	// White space and the order of names are nobody's business.
	var tree any
	if err := json.Unmarshal(bytes.ReplaceAll(data, []byte(`"sequence": `), []byte(`"sequence":	`)), &tree); err != nil {
		t.Fatal(err)
	}
	sorted, err := json.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b, parse(t, sorted)); diff != "" {
		t.Error(diff)
	}
	replace := func(old, new string) []byte {
		out := strings.Replace(string(data), old, new, 1)
		if out == string(data) {
			t.Fatalf("no %q in the bundle", old)
		}
		return []byte(out)
	}
	for name, bad := range map[string][]byte{
		"nothing":           nil,
		"null":              []byte("null"),
		"a list":            []byte("[]"),
		"a string":          []byte(`"yinjian-evidence/1"`),
		"format alone":      []byte(`{"format":"yinjian-evidence/1"}`),
		"another format":    replace("yinjian-evidence/1", "yinjian-evidence/2"),
		"data after it":     append(bytes.Clone(data), '{', '}'),
		"cut":               data[:len(data)-2],
		"a name more":       replace(`"record_id"`, `"more": 1, "record_id"`),
		"a name more, deep": replace(`"signer":`, `"more": 1, "signer":`),
		"a name twice":      replace(`"signer":`, `"signer": "D002", "signer":`),
		"twice, at the top": replace(`"record_id"`, `"format": "yinjian-evidence/1", "record_id"`),
		"capitals":          replace(`"signer":`, `"Signer": "D002", "signer":`),
		"capitals alone":    replace(`"signer":`, `"SIGNER":`),
		"long s":            replace(`"signer":`, `"ſigner":`), // encoding/json takes it for an s
		"a name missing":    replace(`"campus": "本部",`, ``),
		"an odd number":     replace(`"tree_size": `, `"tree_size": 1e0,"x": `),
		"a fraction":        replace(`"size": `, `"size": 0.`),
		"false spelt out":   replace(`"stamp_policy"`, `"test": false, "stamp_policy"`),
		"deep":              []byte(strings.Repeat(`{"a":`, 1000) + "1" + strings.Repeat("}", 1000)),
		"not UTF-8":         replace(`"campus": "本部"`, "\"campus\": \"\xff\""),
		"half a character":  replace(`"campus": "本部"`, `"campus": "\ud800"`),
	} {
		b, err := evidence.Parse(bad)
		if err == nil && name != "not UTF-8" && name != "half a character" {
			t.Errorf("%s: taken", name)
		}
		if err == nil { // encoding/json puts U+FFFD in; the leaf has none
			wants(t, evidence.Verify(b, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckLeafMatch)
		}
	}
	if _, err := evidence.Parse(make([]byte, evidence.MaxBundle+1)); err == nil {
		t.Error("a file of any size is taken")
	}
}

func TestParseAuthorization(t *testing.T) {
	t.Parallel()
	hex32, digest := strings.Repeat("ab", 16), strings.Repeat("cd", 32)
	good := evidence.Authorization{Version: 1, ID: hex32, Method: evidence.SignerPIN, Level: 2, Subject: "D001", Application: "his", Nonce: hex32,
		Count: 3, GrantedAt: "2026-11-21T10:20:30.1Z", NotAfter: "2026-11-21T10:30:30Z", Proof: "<同意>"}
	stored := func(change func(*evidence.Authorization)) []byte {
		a := good
		change(&a)
		b, err := a.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	bound := func(algorithm string, digests ...string) []byte {
		return stored(func(a *evidence.Authorization) { a.Count, a.DigestAlgorithm, a.Digests = 0, algorithm, digests })
	}
	if _, err := evidence.ParseAuthorization(bound("SM3", digest)); err != nil {
		t.Errorf("bound to a document: %v", err)
	}
	same := func(*evidence.Authorization) {}
	a, err := evidence.ParseAuthorization(stored(same))
	if err != nil || !cmp.Equal(*a, good) {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := evidence.ParseAuthorization(stored(func(a *evidence.Authorization) {
		a.Count, a.DigestAlgorithm, a.Digests, a.NotAfter = 0, "SHA-256", []string{digest}, ""
	})); err != nil {
		t.Errorf("bound to a document: %v", err)
	}
	if _, err := evidence.ParseAuthorization(stored(func(a *evidence.Authorization) { a.Method = "sms" })); err != nil {
		t.Errorf("a method of a later release: %v", err)
	}
	text := string(stored(same))
	for name, bad := range map[string][]byte{
		"nothing":               nil,
		"no JSON":               []byte("x"),
		"another version":       stored(func(a *evidence.Authorization) { a.Version = 2 }),
		"short id":              stored(func(a *evidence.Authorization) { a.ID = "ab" }),
		"id in capitals":        stored(func(a *evidence.Authorization) { a.ID = strings.ToUpper(hex32) }),
		"no nonce":              stored(func(a *evidence.Authorization) { a.Nonce = "" }),
		"no method":             stored(func(a *evidence.Authorization) { a.Method = "" }),
		"no level":              stored(func(a *evidence.Authorization) { a.Level = 0 }),
		"no subject":            stored(func(a *evidence.Authorization) { a.Subject = "" }),
		"no application":        stored(func(a *evidence.Authorization) { a.Application = "" }),
		"no uses":               stored(func(a *evidence.Authorization) { a.Count = 0 }),
		"negative":              stored(func(a *evidence.Authorization) { a.Count = -1 }),
		"too many":              stored(func(a *evidence.Authorization) { a.Count = 501 }),
		"both":                  stored(func(a *evidence.Authorization) { a.DigestAlgorithm, a.Digests = "SM3", []string{digest} }),
		"algorithm left out":    bound("", digest),
		"unknown algorithm":     bound("sm3", digest),
		"algorithm of nothing":  stored(func(a *evidence.Authorization) { a.DigestAlgorithm = "SM3" }),
		"short digest":          bound("SM3", "cd"),
		"digest in capitals":    bound("SM3", strings.ToUpper(digest)),
		"digest twice":          bound("SM3", digest, digest),
		"activation, no end":    stored(func(a *evidence.Authorization) { a.NotAfter = "" }),
		"ends before it begins": stored(func(a *evidence.Authorization) { a.NotAfter = "2026-11-21T10:20:30Z" }),
		"time of a zone":        stored(func(a *evidence.Authorization) { a.GrantedAt = "2026-11-21T18:20:30+08:00" }),
		"time, spelt at length": stored(func(a *evidence.Authorization) { a.GrantedAt = "2026-11-21T10:20:30.100Z" }),
		"no time":               stored(func(a *evidence.Authorization) { a.GrantedAt = "" }),
		"end that is no time":   stored(func(a *evidence.Authorization) { a.NotAfter = "soon" }),
		"words that are lost":   stored(func(a *evidence.Authorization) { a.Proof = "\xff" }),
		"a space":               []byte(strings.Replace(text, ",", ", ", 1)),
		"a name more":           []byte(strings.Replace(text, "{", `{"more":1,`, 1)),
		"a name twice":          []byte(strings.Replace(text, "{", `{"subject":"D002",`, 1)),
		"capitals":              []byte(strings.Replace(text, "subject", "Subject", 1)),
		"data after it":         []byte(text + "\n"),
		"too long":              stored(func(a *evidence.Authorization) { a.Proof = strings.Repeat("x", 70000) }),
	} {
		if _, err := evidence.ParseAuthorization(bad); err == nil {
			t.Errorf("%s: taken: %s", name, bad)
		}
	}
}

// Bundles of an earlier day, with the trust they were made under. They must verify for as long as there are releases:
// testdata is recorded anew (-update) only when a format gets a new number.
func TestRecordedBundles(t *testing.T) {
	t.Parallel()
	file := func(name string) string { return filepath.Join("testdata", name) }
	if *update {
		w := newWard(t)
		write := func(name string, data []byte) {
			if err := os.WriteFile(file(name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for _, k := range kinds {
			write(recorded(k), w.Evidence(w.app, w.Sign(w.app, request(k.String(), k)).RecordID))
		}
		spki, err := smx509.MarshalPKIXPublicKey(w.LogKey.Public())
		if err != nil {
			t.Fatal(err)
		}
		write("log.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
		write("anchors.pem", pki.EncodeCertificatePEMs(w.Trust.Anchors...))
		write("document.xml", testkit.Document)
	}
	trust := recordedTrust(t)
	doc := evidence.Input{Document: read(t, "document.xml")}
	for _, k := range kinds {
		data := read(t, recorded(k))
		r := evidence.Verify(parse(t, data), trust, doc)
		wants(t, r, pki.Valid, pki.Passed, evidence.CheckDocument, evidence.CheckInclusion, evidence.CheckCheckpoint, evidence.CheckConsentBound)
		says(t, r, "not proved")
	}
}

func recorded(k kind) string {
	return "bundle-" + k.form + "-" + strings.ToLower(k.algorithm) + ".json"
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func recordedTrust(t testing.TB) evidence.Trust {
	t.Helper()
	return trustIn(t, "")
}

func trustIn(t testing.TB, folder string) evidence.Trust {
	t.Helper()
	anchors, err := pki.ParseCertificatePEMs(read(t, folder+"anchors.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(read(t, folder+"log.pem"))
	key, err := smx509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return evidence.Trust{Anchors: anchors, LogKeys: []crypto.PublicKey{key}}
}

// FuzzParse feeds files to the reader and, if it takes them, to the judge: no file but a real one is valid.
func FuzzParse(f *testing.F) {
	trust, doc := recordedTrust(f), evidence.Input{Document: read(f, "document.xml")}
	real := map[string]*evidence.Bundle{}
	for _, k := range kinds {
		data := read(f, recorded(k))
		b := parse(f, data)
		real[b.RecordID] = b
		f.Add(data)
		var small bytes.Buffer
		if err := json.Compact(&small, data); err != nil {
			f.Fatal(err)
		}
		f.Add(small.Bytes())
		f.Add(data[:len(data)/2])
	}
	f.Add(read(f, "archived/bundle.json"))
	f.Add([]byte(`{"format":"yinjian-evidence/1"}`))
	f.Add([]byte(`{"format":"yinjian-evidence/1","record":{"size":-1},"journal":{"sequence":18446744073709551615,"leaf":"MAA="}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := evidence.Parse(data)
		if err != nil {
			return
		}
		again := encode(t, b)
		if c, err := evidence.Parse(again); err != nil || !bytes.Equal(encode(t, c), again) {
			t.Fatalf("%s is read and cannot be read again: %v", data, err)
		}
		r := evidence.Verify(b, trust, doc)
		if r.Verdict != pki.Valid {
			return
		}
		want := real[b.RecordID]
		if want == nil {
			t.Fatalf("valid, and never made: %s", data)
		}
		// Certificates and CRLs may be added, a checkpoint's token be missing.
		got := *b
		got.Certificates, got.CRLs = want.Certificates, want.CRLs
		if len(got.Journal.CheckpointToken) == 0 {
			got.Journal.CheckpointToken = want.Journal.CheckpointToken
		}
		if diff := cmp.Diff(want, &got); diff != "" {
			t.Fatalf("valid, and not what was made: %s", diff)
		}
	})
}

// FuzzAltered changes a real file in two places: it is read as the same, or it is not valid.
func FuzzAltered(f *testing.F) {
	trust, doc := recordedTrust(f), evidence.Input{Document: read(f, "document.xml")}
	files := make([][]byte, len(kinds))
	for i, k := range kinds {
		files[i] = read(f, recorded(k))
		f.Add(uint8(i), uint32(100), uint8(1), uint32(0), uint8(0))
		f.Add(uint8(i), uint32(len(files[i])/2), uint8(0x20), uint32(len(files[i])*3/4), uint8(3))
	}
	f.Fuzz(func(t *testing.T, which uint8, at uint32, flip uint8, also uint32, flipAlso uint8) {
		file := files[int(which)%len(files)]
		altered := bytes.Clone(file)
		altered[int(at)%len(file)] ^= flip
		altered[int(also)%len(file)] ^= flipAlso
		b, err := evidence.Parse(altered)
		if err != nil || evidence.Verify(b, trust, doc).Verdict != pki.Valid {
			return
		}
		if diff := cmp.Diff(parse(t, file), b); diff != "" {
			t.Fatalf("bytes %d and %d: valid, and not what was made: %s", at, also, diff)
		}
	})
}

func FuzzParseAuthorization(f *testing.F) {
	for _, k := range kinds {
		f.Add(parse(f, read(f, recorded(k))).Authorization)
	}
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"id":"abababababababababababababababab","method":"signer-pin","level":2,"subject":"D001","application":"his","nonce":"abababababababababababababababab","count":3,"granted_at":"2026-11-21T10:20:30.1Z","not_after":"2026-11-21T10:30:30Z","proof":"x"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := evidence.ParseAuthorization(data)
		if err != nil {
			return
		}
		if again, err := a.Bytes(); err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%s encodes to %s, %v", data, again, err)
		}
	})
}

// FuzzVerifyMessages feeds what the API takes from strangers to the judges of single parts.
func FuzzVerifyMessages(f *testing.F) {
	trust := recordedTrust(f)
	in := evidence.Input{Document: read(f, "document.xml")}
	for _, k := range kinds {
		b := parse(f, read(f, recorded(k)))
		f.Add(b.Signature.Value, b.Certificates[0], b.Token)
	}
	f.Fuzz(func(t *testing.T, value, certificate, token []byte) {
		for _, r := range []*evidence.Report{
			evidence.VerifyCMS(value, trust, in), evidence.VerifyToken(token, trust, in),
			evidence.VerifyRaw("SM2", value, certificate, nil, token, trust, in), evidence.VerifyRaw("RSA-2048", value, certificate, nil, token, trust, in),
		} {
			if r.Verdict == pki.Valid { // no CRL was given
				t.Fatalf("valid without revocation data: %+v", r)
			}
		}
	})
}
