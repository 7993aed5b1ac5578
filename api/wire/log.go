package wire

// SetLog is the body of POST /admin/v1/log; what is left out stays.
type SetLog struct {
	Directory *string `json:"directory,omitempty"` // "": no files
	Level     string  `json:"level,omitempty"`     // error, warning, info, debug
	KeepDays  int     `json:"keep_days,omitempty"` // 180–36500
	Reason    string  `json:"reason"`
}

// ReadLog is the body of POST /admin/v1/log/lines.
type ReadLog struct {
	Lines int `json:"lines,omitempty"` // the last so many, 1–10000; 0: 100
}

// A LogStatus is where the running log goes.
type LogStatus struct {
	Directory string `json:"directory"`        // as it was set
	Folder    string `json:"folder,omitempty"` // where that is; "": standard error alone
	Level     string `json:"level"`
	KeepDays  int    `json:"keep_days"`
	Decided   string `json:"decided_by"` // "config.toml", or who set it since
	Files     int    `json:"files"`
	Bytes     int64  `json:"bytes"`
	Lost      uint64 `json:"lost_lines"` // since the start: these went to standard error alone
	Failed    string `json:"last_failure,omitempty"`
	// List are the files, the one that is written now first, then the newest.
	List []LogFile `json:"list"`
}

// A LogFile is one file of the running log.
type LogFile struct {
	Name     string `json:"name"`
	Bytes    int64  `json:"bytes"`
	Modified string `json:"modified"`         // RFC 3339, UTC, as the file system has it
	Closed   string `json:"closed,omitempty"` // RFC 3339, UTC: since when it is known to be written no more; it is kept from then on
}

// ReadLogFile is the body of POST /admin/v1/log/file.
type ReadLogFile struct {
	Name string `json:"name"`           // one of those listed
	From int    `json:"from,omitempty"` // byte
}

// A LogPart is its answer.
type LogPart struct {
	Content []byte `json:"content"` // 1 MiB at most
	Size    int64  `json:"size"`    // of the file now
}
