// Package report is how the appliance signs what it says about itself: patrols, assessments, drills. The SM3 of each of a
// report's files stands in an entry of the journal, and the log key's checkpoint over it, with the inclusion proof, is the
// signature: a [backup.Receipt], which needs the log's public key alone. What a report says is its maker's affair.
package report

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/audit"
	"yinjian/appliance/backup"
)

// KindFiled is the kind of an entry that signs a report; its payload "object" is a [Statement].
const KindFiled = "report.filed"

// Kinds of reports.
const (
	Patrol = "patrol"
	Assess = "assess"
	Drill  = "drill"
)

// Kinds are all of them.
func Kinds() []string { return []string{Patrol, Assess, Drill} }

// A File is one of a report's files.
type File struct {
	Name string `json:"name"` // without a folder
	SM3  string `json:"sm3"`  // 64 hexadecimal digits
	Size int    `json:"size"` // bytes
}

// FileOf describes a file's content.
func FileOf(name string, content []byte) File {
	sum := sm3.Sum(content)
	return File{name, hex.EncodeToString(sum[:]), len(content)}
}

// A Statement is what the journal keeps of a report.
type Statement struct {
	Kind    string   `json:"kind"`
	Name    string   `json:"name"`    // "daily", "hsm"
	Outcome string   `json:"outcome"` // one word: "normal", "severe", "passed"
	Files   []File   `json:"files"`
	Persons []string `json:"persons,omitempty"`
	// Summary is for the next report of the kind, which goes on from it.
	Summary json.RawMessage `json:"summary,omitempty"`
}

// Ref is the reference of all entries about reports of a kind.
func Ref(kind string) []byte {
	sum := sm3.Sum([]byte("yinjian/report/v1\x00" + kind))
	return sum[:]
}

// FieldVerified is the field of an entry about a patrol that says how much of the journal the appliance itself has verified
// before it filed the patrol. The next one goes on from there, whatever the report says.
const FieldVerified = "verified"

// Draft is the entry.
func (s *Statement) Draft(actor string) (audit.Draft, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return audit.Draft{}, err
	}
	digests := map[string]string{}
	for _, f := range s.Files {
		digests[f.Name] = f.SM3
	}
	fields, err := audit.Changed(nil, map[string]any{"name": s.Name, "outcome": s.Outcome, "files": digests, "persons": strings.Join(s.Persons, "、")})
	if err != nil {
		return audit.Draft{}, err
	}
	return audit.Draft{
		Kind: KindFiled, Actor: actor, Object: s.Kind + "/" + s.Name, Ref: Ref(s.Kind), State: true, Fields: fields,
		Payloads: []audit.Attachment{{Name: "object", MediaType: "application/json", Data: body}},
	}, nil
}

// Parse reads the payload of an entry about a report.
func Parse(e *audit.Entry, body []byte) (*Statement, error) {
	if e.Kind != KindFiled {
		return nil, fmt.Errorf("report: entry %d is %s, not about a report", e.Sequence, e.Kind)
	}
	s := new(Statement)
	if err := json.Unmarshal(body, s); err != nil {
		return nil, fmt.Errorf("report: entry %d: %w", e.Sequence, err)
	}
	return s, nil
}

// ErrDiffers means that a file is not the one that the journal has.
var ErrDiffers = errors.New("文件与日志中的报告不符 (the file is not the one that the journal has)")

// ErrOtherNode means that a report says of itself that it is about another appliance than the one that signed it.
var ErrOtherNode = errors.New("报告自称的设备不是签名的设备 (the report is about another appliance than the one that signed it)")

// aboutAnother says whether a file is JSON that names another appliance.
func aboutAnother(name string, content []byte, node string) bool {
	var says struct {
		Node string `json:"node"`
	}
	return strings.HasSuffix(name, ".json") && json.Unmarshal(content, &says) == nil && says.Node != "" && says.Node != node
}

// Verify proves a receipt with the log's key, and that files, by name, are those of the report, about the appliance that
// signed it. Files of the report that are not given are not looked at; one that is none of the report's is an error.
func Verify(receipt []byte, logKey crypto.PublicKey, files map[string][]byte) (*Statement, *audit.Entry, error) {
	e, err := backup.ParseReceipt(receipt, logKey)
	if err != nil {
		return nil, nil, err
	}
	var r backup.Receipt // whose payloads ParseReceipt has held against the entry
	if err := json.Unmarshal(receipt, &r); err != nil {
		return nil, nil, err
	}
	s, err := Parse(e, r.Payloads["object"])
	if err != nil {
		return nil, nil, err
	}
	known := map[string]File{}
	for _, f := range s.Files {
		known[f.Name] = f
	}
	for name, content := range files {
		f, ok := known[name]
		if !ok {
			return nil, nil, fmt.Errorf("%s: 不是这份报告的文件 (none of the report's files)", name)
		}
		if FileOf(name, content) != f {
			return nil, nil, fmt.Errorf("%s: %w", name, ErrDiffers)
		}
		if aboutAnother(name, content, e.Node) {
			return nil, nil, fmt.Errorf("%s: %w", name, ErrOtherNode)
		}
	}
	return s, e, nil
}
