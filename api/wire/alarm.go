package wire

import "encoding/json"

// TestAlarms is the body of POST /admin/v1/alarms/test: every receiver is sent a message. The answer is a [TestedAlarms].
type TestAlarms struct{}

// TestedAlarms says what came of it.
type TestedAlarms struct {
	ID        string           `json:"id"` // of the message
	Passed    bool             `json:"passed"`
	Receivers []TestedReceiver `json:"receivers"`
}

// A TestedReceiver is one of them.
type TestedReceiver struct {
	Name  string `json:"name"`
	Sent  bool   `json:"sent"`
	Error string `json:"error,omitempty"`
}

// SignReport is the body of POST /admin/v1/reports: a report's files, for the journal. The answer is the entry's receipt,
// which signs them.
type SignReport struct {
	Kind    string          `json:"kind"`              // "patrol", "assess" or "drill"
	Name    string          `json:"name"`              // [a-z0-9-]{1,32}: "daily"
	Outcome string          `json:"outcome"`           // [a-z-]{1,32}: "normal", "severe", "passed"
	Files   []ReportFile    `json:"files"`             // 1 to 16
	Persons []string        `json:"persons,omitempty"` // two, where two decided
	Summary json.RawMessage `json:"summary,omitempty"` // at most 32 KiB
}

// A ReportFile is one of a report's files.
type ReportFile struct {
	Name string `json:"name"` // 1–128 bytes, without a folder
	SM3  string `json:"sm3"`  // 64 hexadecimal digits
	Size int    `json:"size"` // bytes
}
