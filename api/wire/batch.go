package wire

// A BatchRequest is the body of POST /v1/batches: several documents of one signer, under one consent. Each item is signed and
// recorded by itself, as POST /v1/sign does it; fields beside items are those of [SignRequest] and hold for all.
type BatchRequest struct {
	Signer    string      `json:"signer"`
	Algorithm string      `json:"algorithm"`
	Form      string      `json:"form"`
	Detached  *bool       `json:"detached,omitempty"`
	Role      string      `json:"role"`
	Consent   Consent     `json:"consent"`
	Items     []BatchItem `json:"items"` // 1–500
}

// A BatchItem is one document.
type BatchItem struct {
	IdempotencyKey string   `json:"idempotency_key"` // as the header of POST /v1/sign; no two of a batch are equal
	Content        []byte   `json:"content,omitempty"`
	Digest         *Digest  `json:"digest,omitempty"`
	Document       Document `json:"document"`
}

// A BatchResult is the answer of POST /v1/batches, in the order of the request.
type BatchResult struct {
	Items []BatchOutcome `json:"items"`
}

// A BatchOutcome has a result or a problem.
type BatchOutcome struct {
	IdempotencyKey string      `json:"idempotency_key"`
	Result         *SignResult `json:"result,omitempty"`
	Problem        *Problem    `json:"problem,omitempty"`
}
