package wire

// SetCustodians is the body of POST /admin/v1/backups/custodians: whom backups are sealed to from now on.
type SetCustodians struct {
	Record  []byte   `json:"record"`  // as `yinjian backup custodians` writes it
	Persons []string `json:"persons"` // two
}

// BeginBackup is the body of POST /admin/v1/backups: a backup is about to be written. The answer is a [BegunBackup].
type BeginBackup struct {
	Persons     []string `json:"persons"` // two
	Target      string   `json:"target"`
	Incremental bool     `json:"incremental"` // continue the last one
	Softtoken   bool     `json:"softtoken"`   // with the software cipher machine's store
}

// A BegunBackup is what whoever writes the backup has to know.
type BegunBackup struct {
	ID         string      `json:"id"`
	Node       string      `json:"node"`
	Epoch      string      `json:"epoch"`
	Custodians []byte      `json:"custodians"` // the record
	Base       *BackupBase `json:"base,omitempty"`
}

// A BackupBase is the backup that another one continues.
type BackupBase struct {
	ID      string `json:"id"`
	SM3     string `json:"sm3"`
	Through int    `json:"through"`
}

// CarryBackup is the body of POST /admin/v1/backups/{id}/file: a backup that was begun, to be written by the appliance itself. The
// answer is the file; its trailer [BackupTrailer] says what it is, as an [EndBackup], and without that it is not whole.
type CarryBackup struct {
	ID   string `json:"id"`   // as in the path
	Rate int    `json:"rate"` // MiB read a second; 0: as fast as it goes
}

// BackupTrailer is the trailer field (RFC 9110 §6.5) behind a backup's file.
const BackupTrailer = "Yinjian-Backup"

// EndBackup is the body of POST /admin/v1/backups/{id}/outcome. The answer to a success is its receipt.
type EndBackup struct {
	ID      string `json:"id"`
	Failed  string `json:"failed"`  // why; then nothing else is looked at
	SM3     string `json:"sm3"`     // of the file, hexadecimal
	Size    int    `json:"size"`    // of the file
	Entries int    `json:"entries"` // of the journal in it and those that it continues
	Through int    `json:"through"` // segments up to this number are sealed
}

// FileReport is the body of POST /admin/v1/backups/reports: a verification or a drill, for the journal. The answer is the
// entry's receipt.
type FileReport struct {
	Kind    string   `json:"kind"` // "verify" or "drill"
	Backup  string   `json:"backup"`
	Passed  bool     `json:"passed"`
	Persons []string `json:"persons"` // two
	Report  []byte   `json:"report"`  // JSON
}
