// Package ca is the evaluation CA: it lets a hospital try the appliance before a licensed CA's certificates arrive.
//
// It issues certificates and CRLs with a key in the cipher machine, in the forms that RFC 5280 and GM/T 0015-2012 ask
// for, and writes into each that it is for evaluation only: in the subject's organisation, in the root's name, and as a
// certificate policy with a notice. It is not a certified product and no licensed CA (电子认证服务机构); its
// certificates carry no legal weight under the Electronic Signature Law. It keeps no state: who was given what, which
// serials are spent and what is revoked is the caller's journal. It reads no clock; every time is given.
package ca

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/emmansun/gmsm/smx509"
	"golang.org/x/crypto/cryptobyte"
	casn1 "golang.org/x/crypto/cryptobyte/asn1"

	"yinjian/appliance/pki"
)

const (
	// Mark is in the organisation of every subject.
	Mark = "仅供评估 EVALUATION ONLY"
	// RootName begins the root's common name.
	RootName = "印鉴评估根 CA（仅供评估）"
	// Notice is the explicit text of the certificate policy, at most 200 characters (RFC 5280 §4.2.1.4).
	Notice = "仅供评估，不具法律效力。For evaluation only; not issued by a licensed CA."

	maxNameRunes = 64 // ub-common-name, ub-organization-name (RFC 5280 appendix A)
)

// A Profile is a kind of certificate.
type Profile string

// Profiles. Each gives the key one purpose.
const (
	Staff     Profile = "staff"      // digitalSignature and contentCommitment
	TSA       Profile = "tsa"        // timeStamping, critical and sole
	Log       Profile = "log"        // signs the journal's checkpoints
	TLSServer Profile = "tls-server" // needs a DNS name or address
	TLSClient Profile = "tls-client"
)

// Purpose is what the profile's key is for; ok is false for an unknown profile.
func (p Profile) Purpose() (purpose pki.Purpose, ok bool) {
	purpose, ok = map[Profile]pki.Purpose{Staff: pki.StaffSigning, TSA: pki.TimeStamping, Log: pki.LogSigning,
		TLSServer: pki.TLSServer, TLSClient: pki.TLSClient}[p]
	return purpose, ok
}

// Config says with what the CA works.
type Config struct {
	// Signer is the CA's key: SM2, or RSA from 2048 bits. An SM2 signer is given the message and
	// *sm2.SM2SignerOption and computes e itself with the default identity; an RSA signer gets a SHA-256 digest.
	// hsm.Key is such a signer. It must be safe for concurrent use if the Authority is.
	Signer crypto.Signer
	// Certificate is the CA's own; nil before [Authority.SelfSign].
	Certificate *smx509.Certificate
	// Serials answers a number never answered before, positive, of 16 to 20 bytes as DER INTEGER contents
	// (at least 121 bits, at most 159), unpredictable or holding the node's epoch. It returns after the number is
	// durable: a gap is harmless, a repeat is not.
	Serials func(ctx context.Context) (*big.Int, error)
	// CRLURL, if set, becomes the CRL distribution point of every certificate below the root.
	CRLURL string
}

// An Authority issues. It has no state of its own and is safe for concurrent use.
type Authority struct{ c Config }

// New checks that signer, certificate and key fit together.
func New(c Config) (*Authority, error) {
	if c.Signer == nil || c.Serials == nil {
		return nil, errors.New("ca: signer and serials are needed")
	}
	if err := pki.CheckPublicKey(c.Signer.Public()); err != nil {
		return nil, fmt.Errorf("ca: signer: %w", err)
	}
	if c.CRLURL != "" && !strings.HasPrefix(c.CRLURL, "http://") && !strings.HasPrefix(c.CRLURL, "https://") && !strings.HasPrefix(c.CRLURL, "ldap://") {
		return nil, fmt.Errorf("ca: CRL URL %q is not http, https or ldap", c.CRLURL)
	}
	if c.Certificate == nil {
		return &Authority{c}, nil
	}
	if err := pki.CheckPurpose(c.Certificate, pki.CertificateAuthority); err != nil {
		return nil, fmt.Errorf("ca: %w", err)
	}
	if c.Certificate.KeyUsage&smx509.KeyUsageCRLSign == 0 || len(c.Certificate.SubjectKeyId) == 0 {
		return nil, errors.New("ca: certificate lacks cRLSign or subjectKeyIdentifier")
	}
	if !equalKeys(c.Signer.Public(), c.Certificate.PublicKey) {
		return nil, errors.New("ca: certificate is of another key than the signer's")
	}
	return &Authority{c}, nil
}

func equalKeys(a, b crypto.PublicKey) bool {
	x, errX := smx509.MarshalPKIXPublicKey(a)
	y, errY := smx509.MarshalPKIXPublicKey(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// Certificate is the CA's own, nil before self-signing.
func (a *Authority) Certificate() *smx509.Certificate { return a.c.Certificate }

// SelfSign makes the root certificate for the signer's key: CA, path length 0, so it issues end-entity certificates
// only. The subject's common name is put after [RootName] and its organisation before [Mark]. The Authority itself is
// not changed: record the certificate, then build a new Authority with it. notBefore and notAfter are cut to seconds.
func (a *Authority) SelfSign(ctx context.Context, subject pkix.Name, notBefore, notAfter time.Time) (*smx509.Certificate, error) {
	if a.c.Certificate != nil {
		return nil, errors.New("ca: self-signing: there is a certificate already")
	}
	subject.CommonName = strings.TrimSpace(RootName + " " + subject.CommonName)
	t, err := a.template(ctx, subject, a.c.Signer.Public(), notBefore, notAfter)
	if err != nil {
		return nil, fmt.Errorf("ca: self-signing: %w", err)
	}
	t.KeyUsage = smx509.KeyUsageCertSign | smx509.KeyUsageCRLSign
	t.BasicConstraintsValid, t.IsCA, t.MaxPathLen, t.MaxPathLenZero = true, true, 0, true
	t.AuthorityKeyId = t.SubjectKeyId
	cert, err := a.sign(ctx, t, t, a.c.Signer.Public())
	if err != nil {
		return nil, fmt.Errorf("ca: self-signing: %w", err)
	}
	if err := pki.CheckPurpose(cert, pki.CertificateAuthority); err != nil {
		return nil, fmt.Errorf("ca: self-signing: %w", err)
	}
	return cert, nil
}

// A Request asks for one end-entity certificate.
type Request struct {
	Profile Profile
	// Subject needs a common name. Its organisation is put before [Mark]. No patient's data belongs here.
	Subject pkix.Name
	// StaffNumber (工号) becomes the subject's serialNumber; 2–32 of [A-Za-z0-9-]; Staff needs it, others must not
	// have it.
	StaffNumber string
	// PublicKey is SM2 (*ecdsa.PublicKey on sm2.P256()) or *rsa.PublicKey. That its owner has the private key is for
	// the caller to see to: it was generated in the cipher machine, or a certificate request was verified.
	PublicKey crypto.PublicKey
	// NotBefore and NotAfter lie within the CA's own validity; they are cut to seconds.
	NotBefore, NotAfter time.Time
	DNSNames            []string // TLSServer, TLSClient
	IPs                 []net.IP
}

// Issue makes a certificate. A serial is taken first, and is spent even if an error follows. The signer is not called
// when anything about the request is wrong; ctx bounds the wait for the serial, a signature once begun is finished.
func (a *Authority) Issue(ctx context.Context, r Request) (*smx509.Certificate, error) {
	cert, err := a.issue(ctx, r)
	if err != nil {
		return nil, fmt.Errorf("ca: issuing %s certificate for %q: %w", r.Profile, r.Subject.CommonName, err)
	}
	return cert, nil
}

func (a *Authority) issue(ctx context.Context, r Request) (*smx509.Certificate, error) {
	parent := a.c.Certificate
	purpose, known := r.Profile.Purpose()
	isTLS := r.Profile == TLSServer || r.Profile == TLSClient
	switch {
	case parent == nil:
		return nil, errors.New("the CA has no certificate yet")
	case !known:
		return nil, errors.New("unknown profile")
	case r.Subject.CommonName == "":
		return nil, errors.New("no common name")
	case (r.Profile == Staff) != (r.StaffNumber != ""):
		return nil, errors.New("a staff number is needed for staff, and for nobody else")
	case r.StaffNumber != "" && !validStaffNumber(r.StaffNumber):
		return nil, fmt.Errorf("staff number %q is not 2–32 of [A-Za-z0-9-]", r.StaffNumber)
	case !isTLS && len(r.DNSNames)+len(r.IPs) > 0:
		return nil, errors.New("names of hosts are for TLS only")
	case r.Profile == TLSServer && len(r.DNSNames)+len(r.IPs) == 0:
		return nil, errors.New("a server needs a DNS name or an address")
	case equalKeys(r.PublicKey, a.c.Signer.Public()):
		return nil, errors.New("the CA's own key serves no other purpose")
	case r.NotBefore.Truncate(time.Second).Before(parent.NotBefore) || r.NotAfter.After(parent.NotAfter):
		return nil, errors.New("validity exceeds the CA's own")
	}
	for _, n := range r.DNSNames {
		if !ValidDNSName(n) {
			return nil, fmt.Errorf("DNS name %q", n)
		}
	}
	for _, ip := range r.IPs {
		if ip.To16() == nil {
			return nil, errors.New("malformed address")
		}
	}
	subject := r.Subject
	subject.SerialNumber = r.StaffNumber
	t, err := a.template(ctx, subject, r.PublicKey, r.NotBefore, r.NotAfter)
	if err != nil {
		return nil, err
	}
	t.AuthorityKeyId = parent.SubjectKeyId
	t.KeyUsage = smx509.KeyUsageDigitalSignature
	if r.Profile == Staff || r.Profile == TSA {
		t.KeyUsage |= smx509.KeyUsageContentCommitment
	}
	if ext, ok := pki.ExtKeyUsageExtension(purpose); ok {
		t.ExtraExtensions = append(t.ExtraExtensions, ext)
	}
	t.DNSNames, t.IPAddresses = r.DNSNames, r.IPs
	if a.c.CRLURL != "" {
		t.CRLDistributionPoints = []string{a.c.CRLURL}
	}
	cert, err := a.sign(ctx, t, parent, r.PublicKey)
	if err != nil {
		return nil, err
	}
	// What leaves is looked at as a stranger would.
	if problems := pki.LintLeaf(cert, purpose); len(problems) > 0 {
		return nil, &pki.PurposeError{Purpose: purpose, Problems: problems}
	}
	return cert, nil
}

func validStaffNumber(s string) bool {
	return len(s) >= 2 && len(s) <= 32 && strings.Trim(s, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// ValidDNSName says whether a certificate can be for a host of that name: labels of letters, digits and hyphens (RFC 1034 §3.5).
func ValidDNSName(s string) bool {
	if s == "" || len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-") != "" {
			return false
		}
	}
	return true
}

// template fills what all certificates share.
func (a *Authority) template(ctx context.Context, subject pkix.Name, pub crypto.PublicKey, notBefore, notAfter time.Time) (*smx509.Certificate, error) {
	if err := pki.CheckPublicKey(pub); err != nil {
		return nil, err
	}
	notBefore, notAfter = notBefore.UTC().Truncate(time.Second), notAfter.UTC().Truncate(time.Second)
	if !notAfter.After(notBefore) || notBefore.Year() < 1950 || notAfter.Year() > 9999 {
		return nil, errors.New("empty or absurd validity")
	}
	subject, err := marked(subject)
	if err != nil {
		return nil, err
	}
	policy, err := policyExtension()
	if err != nil {
		return nil, err
	}
	keyID, err := pki.KeyID(pub)
	if err != nil {
		return nil, err
	}
	serial, err := a.c.Serials(ctx)
	if err != nil {
		return nil, fmt.Errorf("serial: %w", err)
	}
	if serial == nil || serial.Sign() <= 0 || serial.BitLen() <= 120 || serial.BitLen() > 159 {
		return nil, errors.New("serial is not a positive number of 16 to 20 bytes")
	}
	return &smx509.Certificate{
		SerialNumber:    new(big.Int).Set(serial),
		Subject:         subject,
		NotBefore:       notBefore,
		NotAfter:        notAfter,
		SubjectKeyId:    keyID,
		ExtraExtensions: []pkix.Extension{policy},
	}, nil
}

// marked puts [Mark] into the organisation, and refuses names that others would refuse.
func marked(n pkix.Name) (pkix.Name, error) {
	o := ""
	if len(n.Organization) > 1 {
		return n, errors.New("more than one organisation")
	}
	if len(n.Organization) == 1 {
		o = strings.TrimSpace(strings.ReplaceAll(n.Organization[0], Mark, ""))
	}
	n.Organization = []string{strings.TrimSpace(o + " " + Mark)}
	n.Names, n.ExtraNames = nil, nil // raw names would get round the mark
	all := slices.Concat(n.Country, n.Organization, n.OrganizationalUnit, n.Locality, n.Province, n.StreetAddress,
		n.PostalCode, []string{n.CommonName, n.SerialNumber})
	for _, s := range all {
		if !utf8.ValidString(s) || utf8.RuneCountInString(s) > maxNameRunes || strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f }) {
			return n, fmt.Errorf("name %q is malformed or longer than %d characters", s, maxNameRunes)
		}
	}
	for _, c := range n.Country {
		if len(c) != 2 || strings.Trim(c, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") != "" {
			return n, fmt.Errorf("country %q is not two capitals", c)
		}
	}
	return n, nil
}

// policyExtension is certificatePolicies with our one policy and a user notice.
func policyExtension() (pkix.Extension, error) {
	var b cryptobyte.Builder
	b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // CertificatePolicies
		b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // PolicyInformation
			b.AddASN1ObjectIdentifier(pki.OIDPolicyEvaluation)
			b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // policyQualifiers
				b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) { // PolicyQualifierInfo
					b.AddASN1ObjectIdentifier(asn1.ObjectIdentifier{1, 3, 6, 1, 5, 5, 7, 2, 2}) // id-qt-unotice
					b.AddASN1(casn1.SEQUENCE, func(b *cryptobyte.Builder) {                     // UserNotice
						b.AddASN1(casn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(Notice)) })
					})
				})
			})
		})
	})
	value, err := b.Bytes()
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 32}, Value: value}, err
}

// sign has the signer sign t under parent, and reads the result back. smx509 verifies the signature before it answers.
func (a *Authority) sign(ctx context.Context, t, parent *smx509.Certificate, pub crypto.PublicKey) (*smx509.Certificate, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	der, err := smx509.CreateCertificate(rand.Reader, t, parent, pub, a.c.Signer)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return pki.ParseCertificate(der)
}

// A Revoked certificate, as a CRL lists it.
type Revoked struct {
	Serial *big.Int
	At     time.Time // revocationDate; not after the list's thisUpdate
	// Reason is 0–6, 9 or 10. Unspecified is written by leaving the reason out (RFC 5280 §5.3.1). A TSA's certificate
	// revoked without a reason voids all its tokens (RFC 3161 §4): give Superseded or CessationOfOperation when its key
	// is in no other hands.
	Reason pki.Reason
}

// CRL makes a full list, DER. number grows with each list; revoked is everything revoked so far, in any order, each
// serial once. The caller keeps certificates listed beyond their expiry if old signatures are to be judged by new
// lists; this package drops none. Times are cut to seconds.
func (a *Authority) CRL(ctx context.Context, number *big.Int, thisUpdate, nextUpdate time.Time, revoked []Revoked) ([]byte, error) {
	der, err := a.crl(ctx, number, thisUpdate.UTC().Truncate(time.Second), nextUpdate.UTC().Truncate(time.Second), revoked)
	if err != nil {
		return nil, fmt.Errorf("ca: making CRL: %w", err)
	}
	return der, nil
}

func (a *Authority) crl(ctx context.Context, number *big.Int, thisUpdate, nextUpdate time.Time, revoked []Revoked) ([]byte, error) {
	switch {
	case a.c.Certificate == nil:
		return nil, errors.New("the CA has no certificate yet")
	case number == nil || number.Sign() <= 0:
		return nil, errors.New("number is not positive")
	case !nextUpdate.After(thisUpdate) || thisUpdate.Year() < 1950:
		return nil, errors.New("nextUpdate is not after thisUpdate")
	}
	seen := make(map[string]bool, len(revoked))
	entries := make([]smx509.RevocationListEntry, 0, len(revoked))
	for _, r := range revoked {
		if r.Serial == nil || r.Serial.Sign() <= 0 {
			return nil, errors.New("entry without a positive serial")
		}
		key := r.Serial.Text(16)
		at := r.At.UTC().Truncate(time.Second)
		switch {
		case seen[key]:
			return nil, fmt.Errorf("serial %s is listed twice", key)
		case at.After(thisUpdate) || at.Year() < 1950:
			return nil, fmt.Errorf("serial %s is revoked after thisUpdate or at no time", key)
		case !r.Reason.Known() || r.Reason == pki.RemoveFromCRL:
			return nil, fmt.Errorf("serial %s: reason %d has no place in a full list", key, int(r.Reason))
		}
		seen[key] = true
		entries = append(entries, smx509.RevocationListEntry{SerialNumber: r.Serial, RevocationTime: at, ReasonCode: int(r.Reason)})
	}
	// The same journal gives the same list, whatever order the caller read it in.
	slices.SortFunc(entries, func(x, y smx509.RevocationListEntry) int {
		if c := x.RevocationTime.Compare(y.RevocationTime); c != 0 {
			return c
		}
		return x.SerialNumber.Cmp(y.SerialNumber)
	})
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	der, err := smx509.CreateRevocationList(rand.Reader, &smx509.RevocationList{
		Number: number, ThisUpdate: thisUpdate, NextUpdate: nextUpdate, RevokedCertificateEntries: entries,
	}, a.c.Certificate, a.c.Signer)
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	if _, err := pki.ParseCRL(der); err != nil {
		return nil, err
	}
	return der, nil
}
