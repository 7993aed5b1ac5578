package wire

// RegisterApplication is the body of POST /admin/v1/applications.
type RegisterApplication struct {
	ID      string   `json:"id"`      // [a-z0-9-]{2,32}
	Name    string   `json:"name"`    // 1–128 bytes
	Campus  string   `json:"campus"`  // 1–64 bytes
	Rights  []string `json:"rights"`  // account.Right…
	Stamp   string   `json:"stamp"`   // "required" or "none"
	Consent []string `json:"consent"` // methods of which one suffices
	Test    bool     `json:"test,omitempty"`
	// Production: test signers are refused. Not with Test.
	Production bool `json:"production,omitempty"`

	Rate  int `json:"rate"`  // requests a second, 0–10000; 0 means the appliance's default
	Burst int `json:"burst"` // requests at once, 0–100000; 0 means twice the rate, or the default
	// Signatures a second, 0–10000, and at once, 0–1000; 0 means the appliance's default.
	HSMRate     int `json:"hsm_rate,omitempty"`
	HSMSessions int `json:"hsm_sessions,omitempty"`
}

// LimitApplication is the body of POST /admin/v1/applications/{id}/limits.
type LimitApplication struct {
	ID     string `json:"-"`
	Rate   int    `json:"rate"`  // as in RegisterApplication
	Burst  int    `json:"burst"` // the same
	Reason string `json:"reason"`

	HSMRate     int `json:"hsm_rate,omitempty"` // the same
	HSMSessions int `json:"hsm_sessions,omitempty"`
}

// AddMachine is the body of POST /admin/v1/machines.
type AddMachine struct {
	File   []byte `json:"file"` // TOML, the keys of one [[hsm.machines]]
	Reason string `json:"reason"`
}

// ChangeMachine is the body of POST /admin/v1/machines/{name}/drain, /resume and /remove.
type ChangeMachine struct {
	Name   string `json:"-"`
	Reason string `json:"reason"`
	Force  bool   `json:"force,omitempty"` // although keys that no other machine holds cannot be used then
}

// A RegisteredApplication is its answer, and the only time that the HMAC key is shown.
type RegisteredApplication struct {
	Application any    `json:"application"`
	Key         []byte `json:"key"` // HMAC-SM3 key
}

// EnrolSigner is the body of POST /admin/v1/signers.
type EnrolSigner struct {
	ID         string   `json:"id"`         // staff number, [A-Za-z0-9-]{2,32}
	Name       string   `json:"name"`       // 1–128 bytes, at most 64 characters
	Department string   `json:"department"` // 1–128 bytes, at most 64 characters
	Campus     string   `json:"campus"`     // 1–64 bytes
	Algorithms []string `json:"algorithms"` // "SM2", "RSA-2048": one key and certificate each
	PIN        string   `json:"pin,omitempty"`
	CA         string   `json:"ca,omitempty"`   // "evaluation", also when left out, or "external": the keys wait for certificates
	Role       string   `json:"role,omitempty"` // the post, 1–128 bytes
	Test       bool     `json:"test,omitempty"` // an account for tests, for ever
}

// AddSignerKey is the body of POST /admin/v1/signers/{id}/keys.
type AddSignerKey struct {
	Signer    string `json:"-"`
	Algorithm string `json:"algorithm"`    // "SM2" or "RSA-2048", one that the signer has no key of
	CA        string `json:"ca,omitempty"` // as in EnrolSigner
}

// SetSignerPIN is the body of POST /admin/v1/signers/{id}/pin.
type SetSignerPIN struct {
	Signer string `json:"-"`
	PIN    string `json:"pin"`
	// OldPIN is the present one. It is needed where the signer's keys are in custody, sealed under it.
	OldPIN string `json:"old_pin,omitempty"`
}

// RecoverSigner is the body of POST /admin/v1/signers/{id}/recover: a new PIN for custody keys whose PIN was forgotten.
type RecoverSigner struct {
	Signer string   `json:"-"`
	PIN    string   `json:"pin"`
	Shares [][]byte `json:"shares"` // the officers', as they were printed
}

// DestroyKey is the body of POST /admin/v1/keys/destroy.
type DestroyKey struct {
	Label  string `json:"label"`
	Reason string `json:"reason"` // 1–256 bytes
}

// Ceremony is the body of POST /admin/v1/ceremonies: the minutes of a key ceremony, for the journal.
type Ceremony struct {
	Minutes []byte `json:"minutes"` // as `yinjian ceremony` wrote them
}

// Rederive is the body of POST /admin/v1/ceremonies/rederive: what needs no PIN for it is brought under the MAC keys that the
// present ceremony made.
type Rederive struct{}

// A Decision is the body of the routes that stop or start something: what it concerns (from the path) and why.
type Decision struct {
	ID     string `json:"-"`
	Reason string `json:"reason"` // 1–256 bytes
}

// RevokeCertificate is the body of POST /admin/v1/certificates/{serial}/revoke.
type RevokeCertificate struct {
	Serial string `json:"-"`      // hex, lower case
	Reason string `json:"reason"` // a CRLReason of RFC 5280 §5.3.1 by name: "keyCompromise"
}

// IssueCRL is the body of POST /admin/v1/crls.
type IssueCRL struct{}

// AuditVerify is the body of POST /admin/v1/audit/verify.
type AuditVerify struct{}

// Stamp is the body of POST /admin/v1/stamps: a timestamp for the administrator's own files, as reports.
type Stamp struct {
	Request []byte `json:"request"` // DER of a TimeStampReq
}

// Stamped is its answer.
type Stamped struct {
	Response []byte `json:"response"` // DER of a TimeStampResp
}

// AddAnchor is the body of POST /admin/v1/anchors.
type AddAnchor struct {
	Certificate []byte   `json:"certificate"`    // a file: PEM or DER, one certificate
	Uses        []string `json:"uses"`           // "staff", "tsa", "log", "tls"
	Note        string   `json:"note,omitempty"` // 1–256 bytes
}

// AddIntermediates is the body of POST /admin/v1/intermediates.
type AddIntermediates struct {
	File []byte `json:"file"` // PEM, DER or PKCS#7
}

// RequestCertificate is the body of POST /admin/v1/certificates/requests.
type RequestCertificate struct {
	For     string   `json:"for"` // "signer:D10023", "signer:D10023/RSA-2048", "tsa:sm2" and other units, "log", "tls"
	NewKey  bool     `json:"new_key,omitempty"`
	Replace bool     `json:"replace,omitempty"`
	Subject string   `json:"subject,omitempty"` // "CN=…,O=…"; 1–512 bytes
	Hosts   []string `json:"hosts,omitempty"`   // tls: DNS names and addresses
}

// A CertificateRequest is the part of its answer that a client needs.
type CertificateRequest struct {
	Owner     string `json:"owner"`
	Algorithm string `json:"algorithm"`
	Subject   string `json:"subject"`
	CSR       []byte `json:"csr"` // PKCS#10, DER
}

// ImportCertificates is the body of POST /admin/v1/certificates.
type ImportCertificates struct {
	File          []byte   `json:"file"`            // PEM, DER or PKCS#7
	Chain         [][]byte `json:"chain,omitempty"` // more files, of CA certificates
	Owner         string   `json:"owner,omitempty"` // if set, whose key it must be for: "signer:D10023"
	AcceptSubject bool     `json:"accept_subject,omitempty"`
}

// ImportCRL is the body of POST /admin/v1/trust/crls.
type ImportCRL struct {
	File   []byte `json:"file"`   // DER or PEM
	Source string `json:"source"` // where it came from, for people; 1–256 bytes
}

// FetchCRLs is the body of POST /admin/v1/trust/crls/fetch: all configured addresses, now.
type FetchCRLs struct{}
