package wire

import "yinjian/appliance/assess"

// Assess is the body of POST /admin/v1/assessments: a pack for an evaluator is made. It takes some seconds, with Full minutes.
type Assess struct {
	Nonce    string           `json:"nonce"`              // the assessor's, 8 to 128 letters, digits, '.', '_', '-'
	Assessor string           `json:"assessor"`           // who assesses, 1–128 bytes
	Full     bool             `json:"full"`               // random numbers by the power-on set, and a journal of any length
	Products []assess.Product `json:"products,omitempty"` // certified products, as the operator entered them
}

// Assessed is its answer.
type Assessed struct {
	Pack []byte `json:"pack"` // the file
}
