package wire

// Sweep is the body of POST /admin/v1/sweep: the central database is gone through by its MACs.
type Sweep struct{}

// ListChanges is the body of POST /admin/v1/changes: what was changed, of the central database.
type ListChanges struct {
	Object string `json:"object,omitempty"` // 1–256 bytes: an application's or signer's id, a serial, a label …
	Actor  string `json:"actor,omitempty"`  // a part of it, 1–256 bytes
	Kind   string `json:"kind,omitempty"`   // its beginning, 1–64 bytes: "account.", "trust.anchor"
	Since  string `json:"since,omitempty"`  // RFC 3339; left out: thirty days ago
	Until  string `json:"until,omitempty"`  // RFC 3339, not included; left out: now
	Limit  int    `json:"limit,omitempty"`  // the newest so many, 1–10000; 0: 200
}

// A Change is one of its answers' lines: who, when, what, before and after, and why.
type Change struct {
	Node     string `json:"node"`
	Sequence uint64 `json:"sequence"` // of the journal's entry
	Epoch    string `json:"epoch"`
	Time     string `json:"time"` // RFC 3339, UTC
	Actor    string `json:"actor"`
	Kind     string `json:"kind"`
	Act      string `json:"act,omitempty"`
	Object   string `json:"object"`
	Reason   string `json:"reason,omitempty"`
	Before   string `json:"before,omitempty"` // JSON
	After    string `json:"after,omitempty"`  // JSON
	// MAC is "ok"; "wrong": the row is not what this appliance wrote; "other": another appliance wrote it, and can tell.
	MAC string `json:"mac"`
}

// Changes is the answer.
type Changes struct {
	Changes []Change `json:"changes"`
	Omitted int      `json:"omitted"` // older ones in the same time, beyond Limit
}
