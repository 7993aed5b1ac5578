package wire

// SetProduction is the body of POST /admin/v1/applications/{id}/production.
type SetProduction struct {
	ID         string `json:"-"`
	Production bool   `json:"production"`
	Reason     string `json:"reason"` // 1–256 bytes
}

// BindClient is the body of POST /admin/v1/applications/{id}/client: by which TLS client certificates it proves itself.
type BindClient struct {
	ID          string `json:"-"`
	By          string `json:"by"`                    // "key", "subject", or "none" to end it
	Certificate []byte `json:"certificate,omitempty"` // a file with certificates, see account.Service.BindClient
	Alone       bool   `json:"alone"`                 // without HMAC-SM3
	Reason      string `json:"reason"`                // 1–256 bytes
}

// ImportSigners is the body of POST /admin/v1/signers/import: 1 to 10,000 signers. One who is enrolled already is never changed.
type ImportSigners struct {
	Signers []ImportSigner `json:"signers"`
	CA      string         `json:"ca,omitempty"`    // as in EnrolSigner, of all
	Trial   bool           `json:"trial,omitempty"` // judge, and write nothing
}

// An ImportSigner is one of them; what is wrong with one is told of that one. The fields are those of EnrolSigner.
type ImportSigner struct {
	ID         string   `json:"id"`
	Name       string   `json:"name"`
	Department string   `json:"department"`
	Campus     string   `json:"campus"`
	Role       string   `json:"role,omitempty"`
	Algorithms []string `json:"algorithms"`
	Test       bool     `json:"test,omitempty"`
}

// ImportedSigners is the answer, in the order of the request.
type ImportedSigners struct {
	Results []ImportedSigner `json:"results"`
}

// An ImportedSigner says what became of one.
type ImportedSigner struct {
	ID          string            `json:"id"`
	Result      string            `json:"result"`                // account.Enrol…
	Differences []FieldDifference `json:"differences,omitempty"` // with "differs"
	// With "refused" and "not tried".
	Code   string `json:"code,omitempty"`
	Field  string `json:"field,omitempty"`
	Detail string `json:"detail,omitempty"`
	Next   string `json:"next,omitempty"`
}

// A FieldDifference is a field of which the appliance and the request say different things. The appliance's stays.
type FieldDifference struct {
	Field string `json:"field"`
	Have  string `json:"have"` // what is there
	Want  string `json:"want"`
}

// A HistorySource is the file that records of an older system are read from.
type HistorySource struct {
	System  string `json:"system"`   // [a-z0-9-]{2,32}
	Name    string `json:"name"`     // for people, 1–256 bytes
	File    string `json:"file"`     // its name, 1–256 bytes
	FileSM3 []byte `json:"file_sm3"` // 32 bytes, of the whole file as it came
}

// ImportHistory is the body of POST /admin/v1/history/records: 1 to 256 records. One that was imported before is never changed.
type ImportHistory struct {
	Source  HistorySource      `json:"source"`
	Records []HistoricalRecord `json:"records"`
	Trial   bool               `json:"trial,omitempty"` // judge, and write nothing
}

// A HistoricalRecord is one of them; what is wrong with one is told of that one.
type HistoricalRecord struct {
	ID              string `json:"id"`
	SignedAt        string `json:"signed_at"` // RFC 3339
	Signer          string `json:"signer,omitempty"`
	SignerName      string `json:"signer_name,omitempty"`
	Role            string `json:"role,omitempty"`
	Department      string `json:"department,omitempty"`
	Campus          string `json:"campus,omitempty"`
	Application     string `json:"application,omitempty"`
	DocumentID      string `json:"document_id,omitempty"`
	DocumentType    string `json:"document_type,omitempty"`
	MediaType       string `json:"media_type,omitempty"`
	DigestAlgorithm string `json:"digest_algorithm,omitempty"`
	Digest          string `json:"digest,omitempty"`         // hex, lower case
	SignatureForm   string `json:"signature_form,omitempty"` // "cms" or "opaque"
	Signature       []byte `json:"signature,omitempty"`
	Line            int    `json:"line"` // where it stands in the file
}

// ImportedHistory is the answer, in the order of the request.
type ImportedHistory struct {
	Results []ImportedRecord `json:"results"`
}

// An ImportedRecord says what became of one.
type ImportedRecord struct {
	RecordID    string            `json:"record_id"` // 64 hexadecimal digits
	Result      string            `json:"result"`    // history.Imported and others
	Differences []FieldDifference `json:"differences,omitempty"`
	Code        string            `json:"code,omitempty"`
	Field       string            `json:"field,omitempty"`
	Detail      string            `json:"detail,omitempty"`
	Next        string            `json:"next,omitempty"`
}

// HistoryTotals is the body of POST /admin/v1/history/totals: what a run over a file came to, for the journal.
type HistoryTotals struct {
	Source     HistorySource `json:"source"`
	MappingSM3 []byte        `json:"mapping_sm3"` // 32 bytes
	Read       int           `json:"read"`        // the sum of the others
	Imported   int           `json:"imported"`
	Present    int           `json:"present"`
	Differs    int           `json:"differs"`
	Refused    int           `json:"refused"`
	NotTried   int           `json:"not_tried"`
}

// HistoryRecord is the body of POST /admin/v1/history/record. The answer is the file about the record.
type HistoryRecord struct {
	System string `json:"system"`
	ID     string `json:"id"` // in the older system
}
