package wire

// The messages of /v1/stf/…: GM/T 0033's operations. Algorithms are SGD_* numbers of GM/T 0006.

// An STFCreateRequest is the body of POST /v1/stf/create-request.
type STFCreateRequest struct {
	Data    []byte `json:"data"`               // what is to be stamped
	ReqType *int   `json:"req_type"`           // 0: the response carries the authority's certificate; 1: it does not
	HashAlg int    `json:"hash_alg,omitempty"` // 1 SM3, also when left out; 4 SHA-256
}

// An STFRequest is its answer.
type STFRequest struct {
	Request []byte `json:"request"` // TimeStampReq, DER
}

// An STFCreateResponse is the body of POST /v1/stf/create-response.
type STFCreateResponse struct {
	Request []byte `json:"request"`           // TimeStampReq, DER
	SigAlg  int    `json:"sig_alg,omitempty"` // 131585 SGD_SM3_SM2, also when left out; 65540 SGD_SHA256_RSA
}

// An STFResponse is its answer.
type STFResponse struct {
	Response []byte `json:"response"` // TimeStampResp, DER
}

// An STFVerify is the body of POST /v1/stf/verify.
type STFVerify struct {
	Response    []byte `json:"response"`              // TimeStampResp or TimeStampToken, DER
	HashAlg     int    `json:"hash_alg,omitempty"`    // whichever it is, when left out
	SigAlg      int    `json:"sig_alg,omitempty"`     // likewise
	Certificate []byte `json:"certificate,omitempty"` // DER; wins over the one in the token
}

// An STFValidity is its answer, when nothing was wrong.
type STFValidity struct {
	Verdict     string   `json:"verdict"`     // "valid", or "indeterminate" while something is unchecked
	Certificate []byte   `json:"certificate"` // that it was verified with, DER
	Given       bool     `json:"given"`       // by the caller
	GenTime     string   `json:"gen_time"`
	Unchecked   []string `json:"unchecked"` // ids of checks, as in the reports of /v1/verify
}

// An STFRead is the body of POST /v1/stf/info.
type STFRead struct {
	Response []byte `json:"response"` // TimeStampResp or TimeStampToken, DER
}

// An STFInfo is its answer.
type STFInfo struct {
	Issuer string `json:"issuer"` // common name of the authority
	Time   string `json:"time"`
}

// An STFReadItem is the body of POST /v1/stf/detail.
type STFReadItem struct {
	Response []byte `json:"response"`
	Item     int    `json:"item"` // 1–12
}

// An STFDetail is its answer: a text, or certificates.
type STFDetail struct {
	Item         int      `json:"item"`
	Text         string   `json:"text,omitempty"`
	Certificates [][]byte `json:"certificates,omitempty"` // DER
	From         string   `json:"from"`                   // "token" or "journal": who says so
}
