package wire

import "encoding/json"

// What an appliance that waits in an empty folder for a backup is doing.
const (
	RestoreWaits = "waiting"   // for files, or for the word to begin
	RestoreRuns  = "restoring" // the files are opened and verified
	RestoreFails = "refused"   // as Failure says; the folder is empty, and it may be begun again
	RestoreDone  = "restored"  // the appliance starts, and this door is gone
)

// RestoreState is the answer to GET /restore/v1.
type RestoreState struct {
	State string `json:"state"`
	// Files are those that have come whole; a restart forgets them.
	Files []RestoreFile `json:"files"`
	// Bytes is how much was read of the files, and Total how much there is to read, while it is restored.
	Bytes   int64           `json:"bytes,omitempty"`
	Total   int64           `json:"total,omitempty"`
	Failure string          `json:"failure,omitempty"`
	Report  json.RawMessage `json:"report,omitempty"` // what was found, once it is restored
}

// A RestoreFile is one that was sent by POST /restore/v1/files/{name}.
type RestoreFile struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	SM3  string `json:"sm3"` // hexadecimal
}

// BeginRestore is the body of POST /restore/v1: what `yinjian restore` is told.
type BeginRestore struct {
	Files  []string `json:"files"`  // by the names under which they were sent
	Shares [][]byte `json:"shares"` // custodians' shares, as their files have them
	// LogKey is the log's public key, PEM; none: the backup's own.
	LogKey         []byte   `json:"log_key,omitempty"`
	WithoutReceipt bool     `json:"without_receipt,omitempty"`
	Persons        []string `json:"persons"` // two
	// Answers are settings and secrets, TOML, over those that the machine was installed with.
	Answers []byte `json:"answers,omitempty"`
}
