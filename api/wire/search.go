package wire

// SearchSigners asks for a page of the signers, in the order of their ids.
type SearchSigners struct {
	Text    string `json:"text,omitempty"`    // a part of id, name, department, campus or post; 1–128 bytes; left out: all
	Stopped *bool  `json:"stopped,omitempty"` // left out: both
	Skip    int    `json:"skip,omitempty"`    // 0–1000000
	Most    int    `json:"most,omitempty"`    // 1–500; left out: 50
}

// SignerPage is its answer.
type SignerPage struct {
	Signers any `json:"signers"`
	Total   int `json:"total"`
}

// SearchKeys asks for a page of the keys that the directory knows, in the order of their owners.
type SearchKeys struct {
	Text  string `json:"text,omitempty"`  // a part of owner, signer's name or label; 1–128 bytes; left out: all
	Scope string `json:"scope,omitempty"` // "own", the appliance's, or "signers"; left out: both
	After string `json:"after,omitempty"` // the Next of the page before
	Most  int    `json:"most,omitempty"`  // 1–500; left out: 50. The owner with whom there are so many is on the page whole
}

// SearchCertificates asks for a page of the certificates of these keys, likewise.
type SearchCertificates struct {
	Text  string `json:"text,omitempty"` // also a part of serial or subject
	Scope string `json:"scope,omitempty"`
	// WithinDays, if given, asks for those that end within so many days, or have, and have no successor; 1–3660.
	WithinDays int    `json:"within_days,omitempty"`
	After      string `json:"after,omitempty"`
	Most       int    `json:"most,omitempty"`
}

// CertificatePage is its answer.
type CertificatePage struct {
	Certificates any    `json:"certificates"`
	Next         string `json:"next,omitempty"` // set if there are more
}

// SearchRecords asks the central database for rows of the journals, newest first. What is left out is no condition.
type SearchRecords struct {
	RecordID    string `json:"record_id,omitempty"`   // 64 hexadecimal digits
	Kind        string `json:"kind,omitempty"`        // the whole of it: "sign.v1"; 1–64 bytes
	Application string `json:"application,omitempty"` // likewise, 1–256 bytes
	Signer      string `json:"signer,omitempty"`      // likewise
	Department  string `json:"department,omitempty"`  // likewise
	Since       string `json:"since,omitempty"`       // RFC 3339; left out: thirty days ago, or with a record id the beginning
	Until       string `json:"until,omitempty"`       // RFC 3339, not included; left out: now
	// After is the Next of the page before.
	After *RecordPlace `json:"after,omitempty"`
	Most  int          `json:"most,omitempty"` // 1–500; left out: 50
}

// A RecordPlace is where a row stands in the order of time.
type RecordPlace struct {
	AtUS     int    `json:"at_us"` // since 1970 UTC
	Node     string `json:"node"`  // 1–64 bytes
	Epoch    string `json:"epoch"` // 16 hexadecimal digits
	Sequence int    `json:"sequence"`
}

// A RecordRow is a row as the database has it; what it says is the database's word, the journal's is in the evidence.
type RecordRow struct {
	RecordID    string `json:"record_id,omitempty"`
	Kind        string `json:"kind"`
	Application string `json:"application,omitempty"`
	Signer      string `json:"signer,omitempty"`
	Department  string `json:"department,omitempty"`
	Type        string `json:"document_type,omitempty"`
	Campus      string `json:"campus,omitempty"`
	Time        string `json:"time"` // RFC 3339, UTC
	BoundUS     int64  `json:"bound_us"`
	Status      string `json:"status"`
	Node        string `json:"node"`
	Epoch       string `json:"epoch"`
	Sequence    uint64 `json:"sequence"`
	Leaf        string `json:"leaf"` // 64 hexadecimal digits
}

// RecordPage is the answer to SearchRecords.
type RecordPage struct {
	Records []RecordRow  `json:"records"`
	Next    *RecordPlace `json:"next,omitempty"` // set if there may be more
}

// ExamineRecord asks for a record's evidence, its verification, and each number of it.
type ExamineRecord struct {
	ID       string `json:"-"`                  // 64 hexadecimal digits
	Document []byte `json:"document,omitempty"` // the original, which is looked at and not kept
}

// ExaminedRecord is its answer.
type ExaminedRecord struct {
	Evidence any `json:"evidence"` // the file, as GET /v1/evidence/{id} answers it
	Report   any `json:"report"`
	Parts    any `json:"parts"`
}
