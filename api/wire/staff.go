package wire

// SetProduction is the body of POST /admin/v1/applications/{id}/production.
type SetProduction struct {
	ID         string `json:"-"`
	Production bool   `json:"production"`
	Reason     string `json:"reason"` // 1–256 bytes
}

// ImportSigners is the body of POST /admin/v1/signers/import: 1 to 64 signers. One who is enrolled already is never changed.
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
	ID          string             `json:"id"`
	Result      string             `json:"result"`                // account.Enrol…
	Differences []SignerDifference `json:"differences,omitempty"` // with "differs"
	// With "refused" and "not tried".
	Code   string `json:"code,omitempty"`
	Field  string `json:"field,omitempty"`
	Detail string `json:"detail,omitempty"`
	Next   string `json:"next,omitempty"`
}

// A SignerDifference is a field of which directory and request say different things. The directory's stays.
type SignerDifference struct {
	Field string `json:"field"`
	Have  string `json:"have"` // in the directory
	Want  string `json:"want"`
}
