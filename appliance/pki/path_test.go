package pki_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"testing"
	"time"

	"github.com/emmansun/gmsm/smx509"

	"yinjian/appliance/pki"
)

// world is a root, an issuing CA and a member of staff, with current empty CRLs.
type world struct {
	root, ca, leaf *node
	opts           pki.Options
}

// build makes a world; the hooks may spoil the templates.
func build(t testing.TB, keys [3]crypto.Signer, spoil func(root, ca, leaf *smx509.Certificate)) *world {
	t.Helper()
	r, c, l := caTemplate("root"), caTemplate("issuing"), staffTemplate("张三")
	if spoil != nil {
		spoil(r, c, l)
	}
	w := &world{}
	w.root = issue(t, r, nil, keys[0])
	w.ca = issue(t, c, w.root, keys[1])
	w.leaf = issue(t, l, w.ca, keys[2])
	w.opts = pki.Options{
		Leaf: w.leaf.cert, Intermediates: certs{w.ca.cert}, Anchors: certs{w.root.cert},
		At: at, Purpose: pki.StaffSigning,
	}
	if w.root.cert.KeyUsage&smx509.KeyUsageCRLSign != 0 && w.ca.cert.KeyUsage&smx509.KeyUsageCRLSign != 0 {
		w.opts.CRLs = []*pki.CRL{crlOf(t, w.root, nil), crlOf(t, w.ca, nil)}
	}
	return w
}

func sm2World(t testing.TB, spoil func(root, ca, leaf *smx509.Certificate)) *world {
	return build(t, [3]crypto.Signer{sm2Key(t), sm2Key(t), sm2Key(t)}, spoil)
}

func TestVerifyPathValid(t *testing.T) {
	t.Parallel()
	k := func(kind byte, i int) crypto.Signer {
		if kind == 'R' {
			return rsaKeys[i]()
		}
		return sm2Key(t)
	}
	for _, kinds := range []string{"SSS", "RRR", "RSS", "SRR", "SSR"} {
		w := build(t, [3]crypto.Signer{k(kinds[0], 0), k(kinds[1], 1), k(kinds[2], 2)}, nil)
		r := pki.VerifyPath(w.opts)
		if r.Verdict != pki.Valid || len(r.Chain) != 3 || r.Chain[0] != w.leaf.cert {
			t.Errorf("%s: %s, %d certificates, %+v", kinds, r.Verdict, len(r.Chain), r.Checks)
		}
		if r.Evaluation {
			t.Errorf("%s: said to be for evaluation", kinds)
		}
	}
}

func TestVerifyPathAnchors(t *testing.T) {
	t.Parallel()
	w := sm2World(t, nil)
	other := sm2World(t, nil) // same names, other keys
	for name, tt := range map[string]struct {
		change func(*pki.Options)
		want   pki.Verdict
		length int
	}{
		"several anchors, same name first": {func(o *pki.Options) { o.Anchors = certs{other.root.cert, w.root.cert} }, pki.Valid, 3},
		"noise among the intermediates": {func(o *pki.Options) {
			o.Intermediates = certs{other.ca.cert, nil, w.leaf.cert, w.root.cert, w.ca.cert, w.ca.cert}
		}, pki.Valid, 3},
		"anchor is the issuing CA":    {func(o *pki.Options) { o.Anchors, o.Intermediates = certs{w.ca.cert}, nil }, pki.Valid, 2},
		"anchor only in the presents": {func(o *pki.Options) { o.Anchors, o.Intermediates = nil, certs{w.ca.cert, w.root.cert} }, pki.Indeterminate, 3},
		"issuer not at hand":          {func(o *pki.Options) { o.Intermediates = nil }, pki.Indeterminate, 1},
		"leaf is an anchor":           {func(o *pki.Options) { o.Anchors = certs{w.leaf.cert} }, pki.Indeterminate, 1},
		"no CRL at all":               {func(o *pki.Options) { o.CRLs = nil }, pki.Indeterminate, 3},
		"no CRL of the root":          {func(o *pki.Options) { o.CRLs = o.CRLs[1:] }, pki.Indeterminate, 3},
		"no time":                     {func(o *pki.Options) { o.At = time.Time{} }, pki.Indeterminate, 3},
		"unknown purpose":             {func(o *pki.Options) { o.Purpose = "" }, pki.Invalid, 3},
		"no leaf":                     {func(o *pki.Options) { o.Leaf = nil }, pki.Indeterminate, 0},
		"too many certificates": {func(o *pki.Options) {
			for range 300 {
				o.Intermediates = append(o.Intermediates, w.root.cert)
			}
		}, pki.Indeterminate, 0},
	} {
		o := w.opts
		tt.change(&o)
		if r := pki.VerifyPath(o); r.Verdict != tt.want || len(r.Chain) != tt.length {
			t.Errorf("%s: %s with %d certificates, want %s with %d: %+v", name, r.Verdict, len(r.Chain), tt.want, tt.length, r.Checks)
		}
	}
}

// Each row spoils one thing, and only the check meant for it may fail.
func TestVerifyPathBadChains(t *testing.T) {
	t.Parallel()
	unknown := pkix.Extension{Id: asn1.ObjectIdentifier{2, 999, 77}, Critical: true, Value: []byte{5, 0}}
	type T = *smx509.Certificate
	for name, tt := range map[string]struct {
		spoil   func(root, ca, leaf T)
		options func(*pki.Options)
		check   string
		status  pki.Status
	}{
		"leaf expired":                 {func(_, _, l T) { l.NotAfter = at.Add(-time.Second) }, nil, pki.CheckPathValidity, pki.Failed},
		"leaf not yet valid":           {func(_, _, l T) { l.NotBefore = at.Add(time.Second) }, nil, pki.CheckPathValidity, pki.Failed},
		"CA expired":                   {func(_, c, _ T) { c.NotAfter = at.Add(-time.Second) }, nil, pki.CheckPathValidity, pki.Failed},
		"root expired":                 {func(r, _, _ T) { r.NotAfter = at.Add(-time.Second) }, nil, pki.CheckPathValidity, pki.Failed},
		"root not yet valid":           {func(r, _, _ T) { r.NotBefore = at.Add(time.Second) }, nil, pki.CheckPathValidity, pki.Failed},
		"path length of the root":      {func(r, _, _ T) { r.MaxPathLen, r.MaxPathLenZero = 0, true }, nil, pki.CheckPathConstraints, pki.Failed},
		"CA without CA:TRUE":           {func(_, c, _ T) { c.IsCA, c.MaxPathLen = false, 0 }, nil, pki.CheckPathConstraints, pki.Failed},
		"CA without basicConstraints":  {func(_, c, _ T) { c.BasicConstraintsValid = false }, nil, pki.CheckPathConstraints, pki.Failed},
		"CA without keyCertSign":       {func(_, c, _ T) { c.KeyUsage = smx509.KeyUsageCRLSign }, nil, pki.CheckPathConstraints, pki.Failed},
		"root without keyCertSign":     {func(r, _, _ T) { r.KeyUsage = smx509.KeyUsageCRLSign }, nil, pki.CheckPathConstraints, pki.Failed},
		"CA for other usages":          {func(_, c, l T) { c.ExtraExtensions = append(c.ExtraExtensions, eku(false, ekuServer)); tsa(l) }, purpose(pki.TimeStamping), pki.CheckPathConstraints, pki.Failed},
		"unknown critical in the leaf": {func(_, _, l T) { l.ExtraExtensions = append(l.ExtraExtensions, unknown) }, nil, pki.CheckPathConstraints, pki.Failed},
		"unknown critical in the CA":   {func(_, c, _ T) { c.ExtraExtensions = append(c.ExtraExtensions, unknown) }, nil, pki.CheckPathConstraints, pki.Failed},
		"unknown critical in the root": {func(r, _, _ T) { r.ExtraExtensions = append(r.ExtraExtensions, unknown) }, nil, pki.CheckPathConstraints, pki.Failed},
		"name constraints":             {func(_, c, _ T) { c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"a.cn"}, true }, nil, pki.CheckPathConstraints, pki.NotChecked},
		"policy constraints": {func(_, c, _ T) {
			c.ExtraExtensions = append(c.ExtraExtensions, pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 36}, Critical: true, Value: []byte{0x30, 3, 0x80, 1, 0}})
		}, nil, pki.CheckPathConstraints, pki.NotChecked},
		"leaf for timestamps":         {func(_, _, l T) { tsa(l) }, nil, pki.CheckPathPurpose, pki.Failed},
		"staff certificate as TSA":    {nil, purpose(pki.TimeStamping), pki.CheckPathPurpose, pki.Failed},
		"staff certificate as server": {nil, purpose(pki.TLSServer), pki.CheckPathPurpose, pki.Failed},
		"staff certificate as CA":     {nil, purpose(pki.CertificateAuthority), pki.CheckPathPurpose, pki.Failed},
		"CA certificate as staff": {func(_, _, l T) {
			l.BasicConstraintsValid, l.IsCA, l.MaxPathLen = true, true, -1
		}, nil, pki.CheckPathPurpose, pki.Failed},
		"leaf without keyUsage":            {func(_, _, l T) { l.KeyUsage = 0 }, nil, pki.CheckPathPurpose, pki.Failed},
		"leaf for encryption":              {func(_, _, l T) { l.KeyUsage = smx509.KeyUsageKeyEncipherment }, nil, pki.CheckPathPurpose, pki.Failed},
		"leaf that signs and encrypts":     {func(_, _, l T) { l.KeyUsage |= smx509.KeyUsageDataEncipherment }, nil, pki.CheckPathPurpose, pki.Failed},
		"leaf without contentCommitment":   {func(_, _, l T) { l.KeyUsage = smx509.KeyUsageDigitalSignature }, nil, pki.CheckPathPurpose, pki.Failed},
		"leaf for staff and for tokens":    {func(_, _, l T) { l.ExtraExtensions = append(l.ExtraExtensions, eku(false, ekuTime)) }, nil, pki.CheckPathPurpose, pki.Failed},
		"one fractional second too late":   {func(_, _, l T) { l.NotAfter = at }, func(o *pki.Options) { o.At = at.Add(time.Millisecond) }, pki.CheckPathValidity, pki.Failed},
		"revocation judged before the act": {nil, func(o *pki.Options) { o.RevocationAt = at.Add(-time.Minute) }, pki.CheckPathRevocation, pki.NotChecked},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := sm2World(t, tt.spoil)
			o := w.opts
			if tt.options != nil {
				tt.options(&o)
			}
			r := pki.VerifyPath(o)
			got := statuses(r)
			for _, id := range pki.PathChecks() {
				want := pki.Passed
				if id == tt.check {
					want = tt.status
				}
				if id == pki.CheckPathRevocation && (o.CRLs == nil || tt.check == pki.CheckPathConstraints) {
					continue // a CA without its CA bits has no usable CRLs either
				}
				if got[id] != want {
					t.Errorf("%s is %s, want %s: %+v", id, got[id], want, r.Checks)
				}
			}
			if r.Verdict == pki.Valid || (tt.status == pki.Failed) != (r.Verdict == pki.Invalid) {
				t.Errorf("verdict %s", r.Verdict)
			}
		})
	}
}

func purpose(p pki.Purpose) func(*pki.Options) { return func(o *pki.Options) { o.Purpose = p } }

func tsa(l *smx509.Certificate) { l.ExtraExtensions = append(l.ExtraExtensions, eku(true, ekuTime)) }

func TestVerifyPathEdgesOfValidity(t *testing.T) {
	t.Parallel()
	w := sm2World(t, func(_, _, l *smx509.Certificate) { l.NotBefore, l.NotAfter = at, at })
	if r := pki.VerifyPath(w.opts); r.Verdict != pki.Valid {
		t.Errorf("at both bounds: %s %+v", r.Verdict, r.Checks)
	}
}

// A forger has the right names, and the key identifiers if he likes, but not the CA's key.
func TestVerifyPathWrongIssuerKey(t *testing.T) {
	t.Parallel()
	w := sm2World(t, nil)
	forged := issue(t, staffTemplate("张三"), &node{w.ca.cert, w.ca.key}, sm2Key(t))
	forger := sm2Key(t)
	for name, tt := range map[string]struct {
		ski       []byte // of the forger's CA
		want      pki.Verdict
		wantCheck pki.Status
	}{
		"same key identifier":  {w.ca.cert.SubjectKeyId, pki.Invalid, pki.Failed},
		"other key identifier": {nil, pki.Indeterminate, ""}, // as when a CA changed its key and we lack the new one
	} {
		tmpl := caTemplate("issuing")
		tmpl.SubjectKeyId = tt.ski
		fakeCA := issue(t, tmpl, nil, forger)
		fake := issue(t, staffTemplate("张三"), fakeCA, sm2Key(t))
		o := w.opts
		o.Leaf = fake.cert
		r := pki.VerifyPath(o)
		if r.Verdict != tt.want || statuses(r)[pki.CheckPathSignatures] != tt.wantCheck {
			t.Errorf("%s: %s %+v", name, r.Verdict, r.Checks)
		}
	}
	// One bit of the signed part, and of the signature.
	for _, where := range []int{len(forged.cert.RawTBSCertificate) / 2, len(forged.cert.Raw) - 3} {
		der := append([]byte{}, forged.cert.Raw...)
		der[where] ^= 1
		cert, err := pki.ParseCertificate(der)
		if err != nil {
			continue
		}
		o := w.opts
		o.Leaf = cert
		if r := pki.VerifyPath(o); r.Verdict == pki.Valid {
			t.Errorf("byte %d changed: %s %+v", where, r.Verdict, r.Checks)
		}
	}
}

func TestVerifyPathLoopsAndCrossCertificates(t *testing.T) {
	t.Parallel()
	rootA, rootB := issue(t, caTemplate("A"), nil, sm2Key(t)), issue(t, caTemplate("B"), nil, sm2Key(t))
	// A and B certify one another.
	aByB := issue(t, caTemplate("A"), rootB, rootA.key)
	bByA := issue(t, caTemplate("B"), rootA, rootB.key)
	leaf := issue(t, staffTemplate("leaf"), rootA, sm2Key(t))
	crls := []*pki.CRL{crlOf(t, rootA, nil), crlOf(t, rootB, nil)}
	o := pki.Options{Leaf: leaf.cert, Intermediates: certs{aByB.cert, bByA.cert}, At: at, Purpose: pki.StaffSigning, CRLs: crls}
	if r := pki.VerifyPath(o); r.Verdict != pki.Indeterminate {
		t.Errorf("a loop without anchor: %s %+v", r.Verdict, r.Checks)
	}
	o.Anchors = certs{rootB.cert}
	if r := pki.VerifyPath(o); r.Verdict != pki.Valid || len(r.Chain) != 3 {
		t.Errorf("across to B: %s %+v", r.Verdict, r.Checks)
	}
	// The direct way is barred (B revoked A's cross-certificate); the other anchor still vouches.
	o.CRLs = []*pki.CRL{crls[0], crlOf(t, rootB, nil, smx509.RevocationListEntry{SerialNumber: aByB.cert.SerialNumber, RevocationTime: at.Add(-day), ReasonCode: 5})}
	if r := pki.VerifyPath(o); r.Verdict != pki.Invalid {
		t.Errorf("cross-certificate revoked: %s %+v", r.Verdict, r.Checks)
	}
	o.Anchors = certs{rootB.cert, rootA.cert}
	if r := pki.VerifyPath(o); r.Verdict != pki.Valid || len(r.Chain) != 2 {
		t.Errorf("by the other anchor: %s %+v", r.Verdict, r.Checks)
	}
}

func TestVerifyPathDepth(t *testing.T) {
	t.Parallel()
	chain := func(n int) pki.Options {
		tip := issue(t, caTemplate("ca 0"), nil, sm2Key(t))
		o := pki.Options{Anchors: certs{tip.cert}, CRLs: []*pki.CRL{crlOf(t, tip, nil)}, At: at, Purpose: pki.StaffSigning}
		for i := 1; i < n-1; i++ {
			tip = issue(t, caTemplate("ca "+string(rune('0'+i))), tip, sm2Key(t))
			o.Intermediates = append(o.Intermediates, tip.cert)
			o.CRLs = append(o.CRLs, crlOf(t, tip, nil))
		}
		o.Leaf = issue(t, staffTemplate("leaf"), tip, sm2Key(t)).cert
		return o
	}
	if r := pki.VerifyPath(chain(8)); r.Verdict != pki.Valid {
		t.Errorf("8 certificates: %s %+v", r.Verdict, r.Checks)
	}
	if r := pki.VerifyPath(chain(9)); r.Verdict != pki.Indeterminate {
		t.Errorf("9 certificates: %s %+v", r.Verdict, r.Checks)
	}
}

// pathLenConstraint counts intermediates that are not self-issued (RFC 5280 §4.2.1.9).
func TestVerifyPathLength(t *testing.T) {
	t.Parallel()
	rt := caTemplate("root")
	rt.MaxPathLen = 1
	root := issue(t, rt, nil, sm2Key(t))
	newKey := issue(t, caTemplate("root"), root, sm2Key(t)) // self-issued: the root's next key
	ca := issue(t, caTemplate("issuing"), newKey, sm2Key(t))
	ca2 := issue(t, caTemplate("second"), ca, sm2Key(t))
	opts := func(by *node) pki.Options {
		return pki.Options{
			Leaf: issue(t, staffTemplate("leaf"), by, sm2Key(t)).cert, Intermediates: certs{newKey.cert, ca.cert, ca2.cert},
			Anchors: certs{root.cert}, At: at, Purpose: pki.StaffSigning,
			CRLs: []*pki.CRL{crlOf(t, root, nil), crlOf(t, newKey, nil), crlOf(t, ca, nil), crlOf(t, ca2, nil)},
		}
	}
	if r := pki.VerifyPath(opts(ca)); r.Verdict != pki.Valid || len(r.Chain) != 4 {
		t.Errorf("self-issued does not count: %s %+v", r.Verdict, r.Checks)
	}
	if r := pki.VerifyPath(opts(ca2)); r.Verdict != pki.Invalid || statuses(r)[pki.CheckPathConstraints] != pki.Failed {
		t.Errorf("one too many: %s %+v", r.Verdict, r.Checks)
	}
}

// Hundreds of look-alike issuers must neither hide the true one behind a budget nor cost much.
func TestVerifyPathLookAlikes(t *testing.T) {
	t.Parallel()
	w := sm2World(t, nil)
	o := w.opts
	key := sm2Key(t)
	o.Intermediates = nil
	for range 200 {
		o.Intermediates = append(o.Intermediates, issue(t, caTemplate("issuing"), nil, key).cert)
	}
	o.Intermediates = append(o.Intermediates, w.ca.cert)
	if r := pki.VerifyPath(o); r.Verdict != pki.Valid {
		t.Errorf("the true issuer has the key identifier: %s %+v", r.Verdict, r.Checks)
	}
	o.Intermediates = o.Intermediates[:200]
	if r := pki.VerifyPath(o); r.Verdict != pki.Indeterminate {
		t.Errorf("without it: %s %+v", r.Verdict, r.Checks)
	}
}

// Other algorithms are never passed, even where smx509 could verify them.
func TestVerifyPathAlgorithms(t *testing.T) {
	t.Parallel()
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w := build(t, [3]crypto.Signer{sm2Key(t), p256, sm2Key(t)}, nil)
	if r := pki.VerifyPath(w.opts); r.Verdict != pki.Indeterminate || statuses(r)[pki.CheckPathAlgorithms] != pki.NotChecked {
		t.Errorf("P-256 CA: %s %+v", r.Verdict, r.Checks)
	}
	w = build(t, [3]crypto.Signer{sm2Key(t), sm2Key(t), p256}, nil)
	if r := pki.VerifyPath(w.opts); r.Verdict != pki.Indeterminate || statuses(r)[pki.CheckPathAlgorithms] != pki.NotChecked {
		t.Errorf("P-256 leaf: %s %+v", r.Verdict, r.Checks)
	}
	w = build(t, [3]crypto.Signer{rsaKeys[0](), rsaKeys[1](), rsaKeys[2]()}, func(_, _, l *smx509.Certificate) { l.SignatureAlgorithm = smx509.SHA1WithRSA })
	if r := pki.VerifyPath(w.opts); r.Verdict != pki.Invalid || statuses(r)[pki.CheckPathAlgorithms] != pki.Failed {
		t.Errorf("SHA-1: %s %+v", r.Verdict, r.Checks)
	}
	short := &rsa.PublicKey{N: new(big.Int).SetBit(big.NewInt(1), 1023, 1), E: 65537}
	w = build(t, [3]crypto.Signer{rsaKeys[0](), rsaKeys[1](), onlyPublic{short}}, nil)
	if r := pki.VerifyPath(w.opts); r.Verdict == pki.Valid {
		t.Errorf("RSA-1024 leaf: %s %+v", r.Verdict, r.Checks)
	}
}

// onlyPublic is a key that never signs.
type onlyPublic struct{ pub crypto.PublicKey }

func (o onlyPublic) Public() crypto.PublicKey { return o.pub }
func (o onlyPublic) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("no private key")
}

func FuzzVerifyPath(f *testing.F) {
	w := sm2World(f, nil)
	f.Add(w.leaf.cert.Raw)
	f.Add(w.ca.cert.Raw)
	f.Add(w.root.cert.Raw)
	f.Add(build(f, [3]crypto.Signer{rsaKeys[0](), rsaKeys[1](), rsaKeys[2]()}, nil).leaf.cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := pki.ParseCertificate(der)
		if err != nil {
			return
		}
		for _, p := range []pki.Purpose{pki.StaffSigning, pki.TimeStamping, pki.LogSigning, pki.TLSServer, pki.CertificateAuthority} {
			pki.LintLeaf(cert, p)
			o := w.opts
			o.Leaf, o.Purpose = cert, p
			r := pki.VerifyPath(o)
			if r.Verdict == pki.Valid && !cert.Equal(w.leaf.cert) && !cert.Equal(w.ca.cert) {
				t.Errorf("a certificate we did not issue is valid: %x", der)
			}
			// As issuer and as anchor it must not break anything either.
			o.Leaf, o.Intermediates, o.Anchors = w.leaf.cert, certs{cert}, certs{cert}
			pki.VerifyPath(o)
			pki.CheckRevocation(pki.RevocationQuestion{Certificate: cert, Issuer: cert, CRLs: o.CRLs, At: at})
		}
		if len(cert.Raw) != len(der) {
			t.Error("bytes left over")
		}
		_ = pki.SerialHex(new(big.Int).Set(cert.SerialNumber))
	})
}
