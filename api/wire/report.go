package wire

import "encoding/json"

// ListReports is the body of POST /admin/v1/reports/list: what was filed of a kind, the newest first.
type ListReports struct {
	Kind string `json:"kind"`           // "patrol", "assess" or "drill"
	Most int    `json:"most,omitempty"` // 1–500; left out: 50
}

// FiledReports is its answer.
type FiledReports struct {
	Reports []FiledReport `json:"reports"`
	Omitted int           `json:"omitted"` // older ones
}

// A FiledReport is what the journal says of a report.
type FiledReport struct {
	Sequence int         `json:"sequence"` // of the entry
	At       string      `json:"at"`       // RFC 3339, UTC
	Actor    string      `json:"actor"`
	Kind     string      `json:"kind"`
	Name     string      `json:"name"`
	Outcome  string      `json:"outcome"`
	Persons  []string    `json:"persons,omitempty"`
	Files    []FiledFile `json:"files"`
}

// A FiledFile is one of its files.
type FiledFile struct {
	ReportFile
	Kept bool `json:"kept"` // it lies in the appliance's folder of reports; what is in it is looked at when it is read
}

// ReadReport is the body of POST /admin/v1/reports/read: one of the files of a report that was filed, or its receipt.
type ReadReport struct {
	Sequence int    `json:"sequence"`
	File     string `json:"file,omitempty"` // its name in the report; left out: the receipt, which is made anew
}

// ReportContent is its answer. A file is answered only if it is the one that the journal has.
type ReportContent struct {
	Name    string `json:"name"`
	Content []byte `json:"content"`
}

// RunPatrol is the body of POST /admin/v1/patrols.
type RunPatrol struct {
	Period string `json:"period"` // "daily", "weekly", "monthly" or "quarterly"
}

// Patrolled is its answer.
type Patrolled struct {
	Filed  FiledReport     `json:"filed"`
	Report json.RawMessage `json:"report"`
}
