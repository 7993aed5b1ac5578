package appliance_test

import (
	"bytes"
	"context"
	"encoding/pem"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"yinjian/appliance"
	"yinjian/appliance/audit"
	"yinjian/appliance/internal/testkit"
	"yinjian/hsm"
	"yinjian/ntp"
	"yinjian/tsa"
)

// TestTokenOfAnotherClock: genTime is the timestamp worker's, the entry's time is this process's, and both clocks may be
// wrong by what they say. The token is found all the same, and the bound in its entry is no smaller than the reading's.
func TestTokenOfAnotherClock(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	for _, ahead := range []time.Duration{0, 3 * time.Millisecond, -3 * time.Millisecond, 900 * time.Millisecond} {
		h.Clock.Advance(time.Minute)
		recorder := appliance.TokenRecorder{Journal: h.Journal.Journal, Unit: "sm2"}
		h.Clock.Change(func(r *ntp.Reading) { r.Time = r.Time.Add(ahead) })
		token, err := h.Stampers[string(hsm.SM2)].Issue(t.Context(), &tsa.Request{Imprint: tsa.ImprintOf([]byte(ahead.String()))})
		if err != nil {
			t.Fatal(err)
		}
		h.Clock.Change(func(r *ntp.Reading) { r.Time = r.Time.Add(-ahead) })
		if err := recorder.RecordToken(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		known, err := appliance.Known(t.Context(), h.Journal.Journal, token)
		if err != nil || known == nil || known.TimeSource != testkit.Provenance || known.Transport != "HTTP" {
			t.Errorf("%v ahead: %+v, %v", ahead, known, err)
		}
		r, err := h.Journal.Entry(t.Context(), h.Journal.Size()-1)
		if err != nil {
			t.Fatal(err)
		}
		if bound, _ := r.Entry.Field("time.bound_us").(audit.Int); time.Duration(bound)*time.Microsecond < token.Provenance.Bound {
			t.Errorf("the entry says %d µs, the reading %v", bound, token.Provenance.Bound)
		}
	}
}

// TestTokenWithoutItsChain: a token that left with certificates is journalled without them, and they once for all. OpenSSL
// reads both, and the token is known with, without and with other certificates.
func TestTokenWithoutItsChain(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	recorder := appliance.TokenRecorder{Journal: h.Journal.Journal, Unit: "sm2"}
	var kept []audit.Hash
	for i := range 3 {
		imprint := tsa.ImprintOf([]byte{byte(i)})
		token, err := h.Stampers[string(hsm.SM2)].Issue(t.Context(), &tsa.Request{Imprint: imprint, CertReq: true})
		if err != nil {
			t.Fatal(err)
		}
		if err := recorder.RecordToken(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		r, err := h.Journal.Entry(t.Context(), h.Journal.Size()-1)
		if err != nil {
			t.Fatal(err)
		}
		bare, err := h.Journal.Payload(t.Context(), &r.Entry, "token")
		if err != nil {
			t.Fatal(err)
		}
		chain, err := h.Journal.Payload(t.Context(), &r.Entry, "certificates")
		if err != nil {
			t.Fatal(err)
		}
		whole, err := tsa.ParseToken(token.DER)
		if err != nil {
			t.Fatal(err)
		}
		alone, err := tsa.ParseToken(bare)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(whole.Certificates()); n == 0 || len(alone.Certificates()) != 0 || len(bare) >= len(token.DER)/2 {
			t.Errorf("%d certificates in the token, %d in the journal's; %d and %d bytes", n, len(alone.Certificates()), len(token.DER), len(bare))
		}
		if _, err := alone.Verify(imprint, whole.Certificates()...); err != nil {
			t.Errorf("the journal's token: %v", err)
		}
		for what, known := range map[string]*tsa.Token{"issued": token, "with its certificates": whole, "without": alone} {
			if k, err := appliance.Known(t.Context(), h.Journal.Journal, known); err != nil || k == nil {
				t.Errorf("the token %s: %+v, %v", what, k, err)
			}
		}
		name := filepath.Join(t.TempDir(), "certificates.der")
		if err := os.WriteFile(name, chain, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("openssl", "pkcs7", "-inform", "DER", "-in", name, "-print_certs").CombinedOutput()
		if err != nil {
			t.Fatalf("openssl pkcs7: %v\n%s", err, out)
		}
		for _, c := range whole.Certificates() {
			if !bytes.Contains(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})) {
				t.Errorf("openssl does not print the certificate of %v:\n%s", c.Subject, out)
			}
		}
		p, _ := r.Entry.Payload("certificates")
		kept = append(kept, p.SM3)
	}
	if kept[0] != kept[1] || kept[0] != kept[2] {
		t.Errorf("the certificates' digests are %v, want one", kept)
	}
}

// TestStoppedWhileUnderWay: a token that was made and not yet journalled when its unit was stopped goes to nobody, and no
// token's entry stands behind that of the decision.
func TestStoppedWhileUnderWay(t *testing.T) {
	t.Parallel()
	h := testkit.New(t)
	stop, recorder := appliance.Stamping(h.Journal.Journal)
	issue := func(ctx context.Context) *tsa.Token {
		token, err := h.Stampers[string(hsm.SM2)].Issue(ctx, &tsa.Request{Imprint: tsa.ImprintOf([]byte("x"))})
		if err != nil {
			t.Error(err)
		}
		return token
	}
	busy, end := context.WithCancel(t.Context())
	defer end()
	var wg sync.WaitGroup
	begun := make(chan struct{}, 64)
	for range 4 {
		wg.Go(func() {
			for recorder("sm2").RecordToken(busy, issue(t.Context())) == nil {
				select {
				case begun <- struct{}{}:
				default:
				}
			}
		})
	}
	for range 8 {
		<-begun
	}
	late := issue(t.Context())
	if err := stop(t.Context(), "sm2"); err != nil {
		t.Fatal(err)
	}
	if recorder("sm2").RecordToken(t.Context(), late) == nil {
		t.Error("a token of a stopped unit was journalled")
	}
	end()
	wg.Wait()
	if err := recorder("rsa").RecordToken(t.Context(), late); err != nil {
		t.Errorf("another unit: %v", err)
	}
	stopped := false
	if err := h.Journal.Range(t.Context(), 0, func(r audit.Record) error {
		switch {
		case r.Entry.Kind == "tsa.service":
			stopped = true
		case r.Entry.Kind == "tsa.token.v1" && r.Entry.Object == "unit/sm2" && stopped:
			t.Errorf("entry %d of a token behind the decision", r.Entry.Sequence)
		}
		return nil
	}); err != nil || !stopped {
		t.Fatal(err, stopped)
	}
}
