package account_test

import (
	"testing"

	"yinjian/appliance/account"
	"yinjian/appliance/internal/testkit"
	"yinjian/appliance/pki"
	"yinjian/appliance/problem"
)

// FuzzImport gives the directory files that pass for a CA's: certificates and lists. Whatever they hold, the answer is a
// refusal with a code, and nothing is written, unless the CA signed it.
func FuzzImport(f *testing.F) {
	ca := newAuthority(f, "市 CA 根", newKey(f))
	stranger := newAuthority(f, "市 CA 根", newKey(f)) // the same name
	h := testkit.New(f)
	if _, err := h.Directory.AddAnchor(f.Context(), "admin", ca.cert.Raw, account.Uses, ""); err != nil {
		f.Fatal(err)
	}
	_, err := h.Directory.Enrol(f.Context(), "admin", account.Enrolment{ID: doctor, Name: "张仲景", Department: "中医内科", Campus: "本部", Algorithms: []string{"SM2"}, External: true})
	if err != nil {
		f.Fatal(err)
	}
	r, err := h.Directory.RequestCertificate(f.Context(), "admin", account.RequestSpec{For: "signer:" + doctor})
	if err != nil {
		f.Fatal(err)
	}
	good := map[string]bool{}
	for _, c := range [][]byte{ca.issue(r.CSR, nil).Raw, ca.crl(1, testkit.Start, year)} {
		good[string(c)] = true
		f.Add(c)
	}
	f.Add(stranger.issue(r.CSR, nil).Raw)
	f.Add(stranger.crl(1, testkit.Start, year))
	f.Add(pki.EncodeCertificatePEMs(stranger.issue(r.CSR, nil), stranger.cert))
	f.Fuzz(func(t *testing.T, file []byte) {
		held := func() int { return len(h.Directory.Certificates()) + len(h.Directory.ListCRLs()) }
		before := held()
		_, err := h.Directory.ImportCertificates(t.Context(), "admin", account.Import{File: file})
		_, _, lerr := h.Directory.ImportCRL(t.Context(), "admin", file, "fuzz")
		for _, e := range []error{err, lerr} {
			if e != nil && problem.CodeOf(e) == problem.Internal {
				t.Errorf("no refusal: %v", e)
			}
		}
		if err != nil && lerr != nil {
			if held() != before {
				t.Error("refused, and yet there")
			}
			return
		}
		// What was taken is one of the two that the CA signed, in whatever dress.
		taken := false
		if certs, err := pki.ParseBundle(file); err == nil {
			for _, c := range certs {
				taken = taken || good[string(c.Raw)]
			}
		}
		if l, err := pki.ParseCRLFile(file); err == nil {
			taken = taken || good[string(l.Raw())]
		}
		if !taken {
			t.Error("taken, and the CA has not signed it")
		}
	})
}
