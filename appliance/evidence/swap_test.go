package evidence_test

import (
	"bytes"
	"fmt"
	"math/big"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"yinjian/appliance/account"
	"yinjian/appliance/audit"
	"yinjian/appliance/evidence"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/pki/ca"
	"yinjian/appliance/sign"
	"yinjian/tsa"
)

// An element is one thing of a bundle that can be taken from another record's. fails are the checks of which one must
// fail when it alone is taken and differs.
type element struct {
	name  string
	take  func(to, from *evidence.Bundle)
	fails []string
}

// elements of a bundle; the whole of it is in them, but for the document.
func elements() []element {
	checkpoint := []string{evidence.CheckCheckpoint}
	leaf, payloads := []string{evidence.CheckLeafMatch}, []string{evidence.CheckPayloads}
	return []element{
		{"record id", func(to, from *evidence.Bundle) { to.RecordID = from.RecordID }, leaf},
		{"record", func(to, from *evidence.Bundle) { to.Record = from.Record }, leaf},
		{"digest", func(to, from *evidence.Bundle) {
			to.Record.Digest, to.Record.DigestAlgorithm = from.Record.Digest, from.Record.DigestAlgorithm
		}, []string{evidence.CheckLeafMatch, evidence.CheckDocument}},
		{"signer", func(to, from *evidence.Bundle) { to.Record.Signer = from.Record.Signer }, leaf},
		{"document's id", func(to, from *evidence.Bundle) { to.Record.DocumentID = from.Record.DocumentID }, leaf},
		{"test mark", func(to, from *evidence.Bundle) { to.Record.Test = from.Record.Test }, leaf},
		{"stamp policy", func(to, from *evidence.Bundle) { to.Record.StampPolicy = from.Record.StampPolicy }, leaf},
		{"time", func(to, from *evidence.Bundle) {
			to.Record.TimeProvenance, to.Record.TimeBoundUS = from.Record.TimeProvenance, from.Record.TimeBoundUS
		}, leaf},
		{"algorithm and form", func(to, from *evidence.Bundle) {
			to.Signature.Algorithm, to.Signature.Form = from.Signature.Algorithm, from.Signature.Form
		}, leaf},
		{"detached", func(to, from *evidence.Bundle) { to.Signature.Detached = from.Signature.Detached }, leaf},
		{"signature", func(to, from *evidence.Bundle) { to.Signature.Value = from.Signature.Value }, payloads},
		{"certificate", func(to, from *evidence.Bundle) {
			to.Certificates = slices.Concat(from.Certificates[:1], to.Certificates[1:])
		}, payloads},
		{"chain", func(to, from *evidence.Bundle) {
			to.Certificates = slices.Concat(to.Certificates[:1], from.Certificates[1:])
		}, payloads},
		{"CRLs", func(to, from *evidence.Bundle) { to.CRLs = from.CRLs }, payloads},
		{"authorisation", func(to, from *evidence.Bundle) { to.Authorization = from.Authorization }, []string{evidence.CheckConsentHash}},
		{"token", func(to, from *evidence.Bundle) { to.Token = from.Token }, payloads},
		{"node and epoch", func(to, from *evidence.Bundle) {
			to.Journal.Node, to.Journal.Epoch = from.Journal.Node, from.Journal.Epoch
		}, leaf},
		{"sequence", func(to, from *evidence.Bundle) { to.Journal.Sequence = from.Journal.Sequence }, leaf},
		{"leaf", func(to, from *evidence.Bundle) { to.Journal.Leaf = from.Journal.Leaf }, []string{evidence.CheckLeafMatch}},
		{"tree size", func(to, from *evidence.Bundle) { to.Journal.TreeSize = from.Journal.TreeSize }, []string{evidence.CheckInclusion}},
		{"proof", func(to, from *evidence.Bundle) { to.Journal.Inclusion = from.Journal.Inclusion }, []string{evidence.CheckInclusion}},
		{"checkpoint", func(to, from *evidence.Bundle) { to.Journal.Checkpoint = from.Journal.Checkpoint },
			checkpoint},
		{"checkpoint's signature", func(to, from *evidence.Bundle) { to.Journal.CheckpointSignature = from.Journal.CheckpointSignature },
			checkpoint},
		{"checkpoint's token", func(to, from *evidence.Bundle) { to.Journal.CheckpointToken = from.Journal.CheckpointToken },
			[]string{evidence.CheckCheckpointToken}},
	}
}

// exchange are two real records and the documents that were signed.
type exchange struct {
	name   string
	a, b   *evidence.Bundle
	da, db []byte
}

func (w *ward) exchanges(t *testing.T) []exchange {
	quiet := w.App("quiet", func(a *account.Application) { a.Stamp = "none" })
	trial := w.App("trial", func(a *account.Application) { a.Test = true })
	n := 0
	make := func(app *account.Application, signer string, k kind, pin bool) (*evidence.Bundle, []byte) {
		n++
		q := testkit.Request(fmt.Sprint("swap-", n), signer)
		q.Algorithm, q.Form, q.Document.ID, q.Detached = k.algorithm, k.form, fmt.Sprint("ZY-", n), k.form == "raw" || n%2 == 0
		q.Content = fmt.Appendf(nil, "<record>%d</record>", n)
		if pin {
			digests := map[string]string{"SM2": "SM3", "RSA-2048": "SHA-256"}
			g := w.Grant(app, account.GrantRequest{Signer: signer, DigestAlgorithm: digests[k.algorithm], Digests: [][]byte{testkit.Digest(k.algorithm, q.Content)}})
			q.Consent = sign.Consent{AuthorizationID: g.ID}
		}
		return parse(t, w.Evidence(app, w.Sign(app, q).RecordID)), q.Content
	}
	var out []exchange
	for _, k := range kinds {
		a, da := make(w.app, "D001", k, false)
		for name, to := range map[string]struct {
			app    *account.Application
			signer string
			k      kind
			pin    bool
		}{
			"another document":   {w.app, "D001", k, false},
			"another signer":     {w.app, "D002", k, false},
			"no stamp":           {quiet, "D001", k, false},
			"a test":             {trial, "D001", k, false},
			"consent by PIN":     {w.app, "D001", k, true},
			"another form":       {w.app, "D001", kind{k.algorithm, map[string]string{"raw": "cms", "cms": "raw"}[k.form]}, false},
			"another algorithm":  {w.app, "D001", kind{map[string]string{"SM2": "RSA-2048", "RSA-2048": "SM2"}[k.algorithm], k.form}, false},
			"all of it, by PIN":  {quiet, "D002", kind{"SM2", "raw"}, true},
			"all of it, stamped": {trial, "D002", kind{"RSA-2048", "cms"}, true},
		} {
			b, db := make(to.app, to.signer, to.k, to.pin)
			// Both ways: what an unstamped test by assertion lacks, a stamped record by PIN has.
			out = append(out, exchange{k.String() + " with " + name, a, b, da, db}, exchange{name + " with " + k.String(), b, a, db, da})
		}
	}
	return out
}

// Elements of one real record's evidence put into another's, one, two and three at once: valid is only what is one
// record's as a whole, with its own document; and what is wrong is called by its name.
func TestElementsOfAnotherRecord(t *testing.T) {
	t.Parallel()
	w := newWard(t)
	all := elements()
	long := os.Getenv("YINJIAN_LONG") != ""
	rnd := rand.New(rand.NewPCG(3, 0))
	for i, x := range w.exchanges(t) {
		var picks [][]int
		for i := range all {
			picks = append(picks, []int{i})
			for j := range i {
				if rnd.IntN(map[bool]int{true: 4, false: 40}[long]) == 0 {
					picks = append(picks, []int{i, j})
				}
				for k := range j {
					if rnd.IntN(map[bool]int{true: 100, false: 2000}[long]) == 0 {
						picks = append(picks, []int{i, j, k})
					}
				}
			}
		}
		if i%map[bool]int{true: 6, false: 36}[long] == 2 { // all pairs, of two exchanges in the short suite
			for i := range all {
				for j := range i {
					picks = append(picks, []int{i, j})
				}
			}
		}
		t.Run(x.name, func(t *testing.T) {
			t.Parallel()
			x.judgeAll(t, w, all, picks)
		})
	}
}

func (x *exchange) judgeAll(t *testing.T, w *ward, all []element, picks [][]int) {
	wholeA, wholeB := encode(t, x.a), encode(t, x.b)
	if r := evidence.Verify(x.b, w.Trust, evidence.Input{Document: x.da}); r.Verdict != pki.Invalid || at(r, evidence.CheckDocument) != pki.Failed {
		t.Errorf("the other record's evidence with this document: %s", problems(r))
	}
	tried := 0
	for _, pick := range picks {
		mixed := with(t, x.a, func(*evidence.Bundle) {})
		var name string
		var fails []string
		for _, i := range pick {
			before := encode(t, mixed)
			all[i].take(mixed, x.b)
			if !bytes.Equal(encode(t, mixed), before) {
				name += all[i].name + ", "
				fails = append(fails, all[i].fails...)
			}
		}
		if bytes.Equal(mixed.Journal.Checkpoint, x.b.Journal.Checkpoint) && bytes.Equal(mixed.Journal.CheckpointSignature, x.b.Journal.CheckpointSignature) {
			fails = append(fails, evidence.CheckInclusion) // it is a checkpoint, and this record is not in it
		}
		now := encode(t, mixed)
		if bytes.Equal(now, wholeA) || bytes.Equal(now, wholeB) {
			continue // they are alike in that
		}
		tried++
		if r := evidence.Verify(mixed, w.Trust, evidence.Input{Document: x.db}); r.Verdict == pki.Valid {
			t.Errorf("%s with the other's document: valid", name)
		}
		r := evidence.Verify(mixed, w.Trust, evidence.Input{Document: x.da})
		// A token that is taken away leaves a gap, which is no failure.
		if r.Verdict == pki.Indeterminate && len(mixed.Token) == 0 && len(x.a.Token) > 0 {
			continue
		}
		if r.Verdict != pki.Invalid || !slices.ContainsFunc(fails, func(id string) bool { return at(r, id) == pki.Failed }) {
			t.Errorf("%s %s, none of %q failed: %s", name, r.Verdict, fails, problems(r))
		}
	}
	if tried < 15 {
		t.Errorf("%d mixtures only", tried)
	}
}

// An appliance that lies in its own log, or is made to: what it recorded beside the signature is judged by who signed it,
// not by the leaf that commits to it.
func TestFalseWitnesses(t *testing.T) {
	t.Parallel()
	w, stranger := newWard(t), newWard(t)
	now := testkit.Start
	serial := func(k kind) *big.Int {
		for _, key := range w.doctor.Keys {
			if key.Algorithm == k.algorithm {
				c, err := pki.ParseCertificate(key.Certificate)
				if err != nil {
					t.Fatal(err)
				}
				return c.SerialNumber
			}
		}
		t.Fatalf("no key for %v", k)
		return nil
	}
	payload := func(d *audit.Draft, name string, data []byte) {
		d.Payloads[slices.IndexFunc(d.Payloads, func(p audit.Attachment) bool { return p.Name == name })].Data = data
	}
	for _, k := range kinds {
		honest := w.bundle(t, request("honest-"+k.String(), k))
		for name, tt := range map[string]struct {
			stranger bool
			change   func(*audit.Draft)
			want     pki.Verdict
			status   pki.Status
			check    string
		}{
			"revoked before": {false, func(d *audit.Draft) {
				payload(d, "crl.0", w.listDER(t, k.algorithm, now.Add(-time.Second), ca.Revoked{Serial: serial(k), At: now.Add(-time.Minute), Reason: pki.KeyCompromise}))
			}, pki.Invalid, pki.Failed, "signer." + pki.CheckPathRevocation},
			"a list that was over": {false, func(d *audit.Draft) {
				payload(d, "crl.0", w.listDER(t, k.algorithm, now.Add(-25*time.Hour)))
			}, pki.Indeterminate, pki.NotChecked, "signer." + pki.CheckPathRevocation},
			"a list of another CA": {true, func(d *audit.Draft) {
				payload(d, "crl.0", stranger.listDER(t, k.algorithm, now.Add(-time.Second)))
			}, pki.Indeterminate, pki.NotChecked, "signer." + pki.CheckPathRevocation},
			"a stranger's clock": {true, func(d *audit.Draft) {
				value := honest.Signature.Value
				token, err := stranger.Stampers[k.algorithm].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf(value), CertReq: true})
				if err != nil {
					t.Fatal(err)
				}
				payload(d, "token", token.DER)
			}, pki.Invalid, pki.Failed, evidence.CheckTokenImprint},
		} {
			if tt.stranger && k.algorithm != "SM2" {
				continue // RSA keys are the same in every test
			}
			b := w.record(t, strings.ReplaceAll(name, " ", "-")+k.String(), k, tt.change)
			r := evidence.Verify(b, w.Trust, document)
			wants(t, r, tt.want, tt.status, tt.check)
			if r.Verdict == pki.Indeterminate && !slices.Contains(r.Missing, tt.check) {
				t.Errorf("%v, %s: missing %q", k, name, r.Missing)
			}
		}
		// The same list put into honest evidence, instead of the recorded one and beside it.
		revoked := w.listDER(t, k.algorithm, now.Add(-time.Second), ca.Revoked{Serial: serial(k), At: now.Add(-time.Minute), Reason: pki.KeyCompromise})
		instead := with(t, honest, func(b *evidence.Bundle) { b.CRLs = [][]byte{revoked} })
		wants(t, evidence.Verify(instead, w.Trust, document), pki.Invalid, pki.Failed, evidence.CheckPayloads)
		beside := with(t, honest, func(b *evidence.Bundle) { b.CRLs = append(b.CRLs, revoked) })
		wants(t, evidence.Verify(beside, w.Trust, document), pki.Invalid, pki.Failed, "signer."+pki.CheckPathRevocation)
	}
	// A stranger's unit over this very signature.
	b := w.record(t, "strangers-unit", kinds[0], func(d *audit.Draft) {
		i := slices.IndexFunc(d.Payloads, func(p audit.Attachment) bool { return p.Name == "signature" })
		token, err := stranger.Stampers["SM2"].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf(d.Payloads[i].Data), CertReq: true})
		if err != nil {
			t.Fatal(err)
		}
		payload(d, "token", token.DER)
	})
	r := evidence.Verify(b, w.Trust, document)
	wants(t, r, pki.Indeterminate, pki.Passed, evidence.CheckPayloads, evidence.CheckTokenImprint)
	if !slices.Contains(r.Missing, "tsa."+pki.CheckPathChain) {
		t.Errorf("missing %q", r.Missing)
	}
}
