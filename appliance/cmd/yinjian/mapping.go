package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"yinjian/api/wire"
	past "yinjian/appliance/history"
)

// A mapping says what in an older system's file is what. Unknown keys are errors.
type mapping struct {
	System  string `toml:"system"`  // [a-z0-9-]{2,32}: with the record's own number it is what a record is known by, for ever
	Name    string `toml:"name"`    // for people
	Format  string `toml:"format"`  // "csv", or "json": objects one after the other, or in one array
	Charset string `toml:"charset"` // as --charset of signer import; JSON is UTF-8
	// Time is how signed_at is written: "rfc3339", "datetime" (2019-03-04 05:06:07 and the like), "unix", "unix_ms".
	Time      string `toml:"time"`
	UTCOffset string `toml:"utc_offset"` // of "datetime": "+08:00", also when left out
	// Fields are columns, or members of the objects ("a.b" is b of the object a), Constants what is the same in all records.
	Fields    mappedFields    `toml:"fields"`
	Constants mappedFields    `toml:"constants"`
	Digest    mappedDigest    `toml:"digest"`
	Signature mappedSignature `toml:"signature"`
	zone      *time.Location
	sources   map[string]string // by our name
	constants map[string]string
}

// mappedFields has a name for each that a record can have.
type mappedFields struct {
	ID              string `toml:"id"`
	SignedAt        string `toml:"signed_at"`
	Signer          string `toml:"signer"`
	SignerName      string `toml:"signer_name"`
	Role            string `toml:"role"`
	Department      string `toml:"department"`
	Campus          string `toml:"campus"`
	Application     string `toml:"application"`
	DocumentID      string `toml:"document_id"`
	DocumentType    string `toml:"document_type"`
	MediaType       string `toml:"media_type"`
	DigestAlgorithm string `toml:"digest_algorithm"`
	Digest          string `toml:"digest"`
	Signature       string `toml:"signature"`
}

type mappedDigest struct {
	Encoding string `toml:"encoding"` // "hex", also when left out, or "base64"
}

type mappedSignature struct {
	Encoding string `toml:"encoding"` // "base64", also when left out, "hex", or "file": the field names a file beside the table
	Form     string `toml:"form"`     // "cms", also when left out, or "opaque": kept and never read
}

const (
	formatCSV  = "csv"
	formatJSON = "json"

	maxMapping = 64 << 10
)

// parseMapping reads and checks a mapping; what it answers has the defaults filled in.
func parseMapping(data []byte) (*mapping, error) {
	m := new(mapping)
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(m); err != nil {
		var unknown *toml.StrictMissingError
		if errors.As(err, &unknown) {
			return nil, fmt.Errorf("不认识的键 (unknown keys):\n%s", unknown.String())
		}
		return nil, err
	}
	for _, d := range []struct {
		v   *string
		def string
	}{{&m.Charset, charsetAuto}, {&m.Time, "datetime"}, {&m.UTCOffset, "+08:00"}, {&m.Digest.Encoding, "hex"}, {&m.Signature.Encoding, "base64"}, {&m.Signature.Form, "cms"}} {
		if *d.v == "" {
			*d.v = d.def
		}
	}
	m.sources, m.constants = named(m.Fields), named(m.Constants)
	var wrong []string
	among := func(key, v string, allowed ...string) {
		if !slices.Contains(allowed, v) {
			wrong = append(wrong, fmt.Sprintf("%s = %q：须为 %s 之一 (must be one of these)", key, v, strings.Join(allowed, "、")))
		}
	}
	among("format", m.Format, formatCSV, formatJSON)
	among("charset", m.Charset, charsetAuto, charsetUTF8, charsetGB18030)
	among("time", m.Time, "rfc3339", "datetime", "unix", "unix_ms")
	among("digest.encoding", m.Digest.Encoding, "hex", "base64")
	among("signature.encoding", m.Signature.Encoding, "base64", "hex", "file")
	among("signature.form", m.Signature.Form, "cms", "opaque")
	if !regexp.MustCompile(`^[a-z0-9][a-z0-9-]{1,31}$`).MatchString(m.System) {
		wrong = append(wrong, "system：须为 2–32 位小写字母、数字或连字符 (lower-case letters, digits and hyphens, 2 to 32)")
	}
	if m.Name == "" {
		wrong = append(wrong, "name：缺少来源系统的名称 (the system's name is missing)")
	}
	for _, key := range []string{"id", "signed_at"} {
		if m.sources[key] == "" {
			wrong = append(wrong, "fields."+key+"：必需 (required)")
		}
		if m.constants[key] != "" {
			wrong = append(wrong, "constants."+key+"：各记录不同，不能是常量 (differs from record to record)")
		}
	}
	for key := range m.constants {
		if m.sources[key] != "" {
			wrong = append(wrong, "constants."+key+"：与 fields 重复 (in fields, too)")
		}
	}
	if m.constants["signature"] != "" || m.constants["digest"] != "" {
		wrong = append(wrong, "constants：签名与摘要不能是常量 (no signature or digest is the same in all records)")
	}
	at, err := time.Parse("Z07:00", m.UTCOffset)
	if err != nil {
		wrong = append(wrong, fmt.Sprintf("utc_offset = %q：须如 +08:00 (must be like that)", m.UTCOffset))
	}
	m.zone = at.Location()
	if len(wrong) > 0 {
		slices.Sort(wrong)
		return nil, errors.New(strings.Join(wrong, "\n"))
	}
	return m, nil
}

// named answers what is given, by the key.
func named(f mappedFields) map[string]string {
	out := map[string]string{}
	v := reflect.ValueOf(f)
	for i := range v.NumField() {
		if s := v.Field(i).String(); s != "" {
			out[v.Type().Field(i).Tag.Get("toml")] = s
		}
	}
	return out
}

// record makes a record of the values, which get answers by column or member. folder is where files of signatures stand.
func (m *mapping) record(get func(source string) string, folder string) (*wire.HistoricalRecord, error) {
	value := func(key string) string {
		if c, ok := m.constants[key]; ok {
			return c
		}
		if source, ok := m.sources[key]; ok {
			return strings.TrimSpace(get(source))
		}
		return ""
	}
	r := &wire.HistoricalRecord{
		ID: value("id"), Signer: value("signer"), SignerName: value("signer_name"), Role: value("role"), Department: value("department"),
		Campus: value("campus"), Application: value("application"), DocumentID: value("document_id"), DocumentType: value("document_type"),
		MediaType: value("media_type"), DigestAlgorithm: value("digest_algorithm"),
	}
	at, err := m.time(value("signed_at"))
	if err != nil {
		return r, fmt.Errorf("signed_at：%w", err)
	}
	r.SignedAt = at.Format(time.RFC3339Nano)
	if v := value("digest"); v == "" {
		r.DigestAlgorithm = "" // a constant, of a record without
	} else if m.Digest.Encoding == "base64" {
		b, err := base64.StdEncoding.DecodeString(v)
		if err != nil {
			return r, fmt.Errorf("digest：不是 base64 (not base64): %w", err)
		}
		r.Digest = hex.EncodeToString(b)
	} else {
		r.Digest = strings.ToLower(v)
	}
	if v := value("signature"); v != "" {
		if r.Signature, err = m.signature(v, folder); err != nil {
			return r, fmt.Errorf("signature：%w", err)
		}
		r.SignatureForm = m.Signature.Form
	}
	return r, nil
}

func (m *mapping) signature(v, folder string) ([]byte, error) {
	switch m.Signature.Encoding {
	case "hex":
		return hex.DecodeString(v)
	case "file":
		if !filepath.IsLocal(v) {
			return nil, fmt.Errorf("文件 %q 不在表格所在目录之内 (not below the table's folder)", v)
		}
		root, err := os.OpenRoot(folder) // follows no link out of it
		if err != nil {
			return nil, err
		}
		defer root.Close()
		info, err := root.Stat(v)
		switch {
		case err != nil:
			return nil, err
		case !info.Mode().IsRegular() || info.Size() > past.MaxSignature:
			return nil, fmt.Errorf("文件 %q 不是普通文件，或超过 %d 字节 (no plain file, or too large)", v, past.MaxSignature)
		}
		return root.ReadFile(v)
	}
	return base64.StdEncoding.DecodeString(strings.Map(func(r rune) rune {
		if r == ' ' || r == '\n' || r == '\r' || r == '\t' {
			return -1
		}
		return r
	}, v))
}

// datetimes are the forms of "datetime".
var datetimes = []string{"2006-01-02 15:04:05.999999", "2006/1/2 15:04:05.999999", "2006-01-02T15:04:05.999999", "20060102150405", "2006-01-02 15:04", "2006/1/2 15:04"}

func (m *mapping) time(v string) (time.Time, error) {
	var at time.Time
	var err error
	switch m.Time {
	case "rfc3339":
		at, err = time.Parse(time.RFC3339, v)
	case "unix", "unix_ms":
		var n int64
		if n, err = strconv.ParseInt(v, 10, 64); m.Time == "unix" {
			at = time.Unix(n, 0)
		} else {
			at = time.UnixMilli(n)
		}
	default:
		for _, layout := range datetimes {
			if at, err = time.ParseInLocation(layout, v, m.zone); err == nil {
				break
			}
		}
	}
	if err == nil && (at.Year() < 1 || at.Year() > 9999) {
		err = errors.New("年份有误 (a year that cannot be)")
	}
	if err != nil {
		return at, fmt.Errorf("%q 不是 time = %q 的写法 (not written that way)", v, m.Time)
	}
	return at.UTC(), nil
}
