package main

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/emmansun/gmsm/sm3"
	"golang.org/x/text/encoding"
	"golang.org/x/text/encoding/simplifiedchinese"
	"golang.org/x/text/transform"
)

// A historyFile is an older system's file, which is read as a stream: it may have millions of records.
type historyFile struct {
	name, folder string
	sum          [32]byte // SM3 of the file as it came
	charset      string
	head         []string // of CSV
	records      int

	m *mapping
}

// A historyRow is one record of the file.
type historyRow struct {
	line int // of CSV the line that it begins on, of JSON its number; from 1
	get  func(source string) string
	raw  []string // as it came, for the quarantine file
}

// openHistory reads the whole file twice: once for digest and character set, once for its form and the number of records, so
// that a file that ends in the middle is refused before anything is written.
func openHistory(name string, m *mapping) (*historyFile, error) {
	h := &historyFile{name: filepath.Base(name), folder: filepath.Dir(name), m: m}
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	digest := sm3.New()
	tee := io.TeeReader(f, digest)
	_, err = io.Copy(io.Discard, transform.NewReader(tee, encoding.UTF8Validator))
	utf := err == nil
	if errors.Is(err, encoding.ErrInvalidUTF8) {
		_, err = io.Copy(io.Discard, tee)
	}
	if err != nil {
		return nil, err
	}
	digest.Sum(h.sum[:0])
	switch {
	case m.Charset == charsetGB18030 && m.Format == formatCSV, m.Charset == charsetAuto && m.Format == formatCSV && !utf:
		h.charset = charsetGB18030
	case !utf:
		return nil, errors.New("文件不是 UTF-8 (not UTF-8)")
	default:
		h.charset = charsetUTF8
	}
	h.records = 0
	if err := h.each(func(historyRow) error { h.records++; return nil }); err != nil {
		return nil, err
	}
	if h.records == 0 {
		return nil, errors.New("没有记录 (no records)")
	}
	return h, nil
}

// maxRecordBytes bounds what one record may take of the file, and so the memory: after a quotation mark that nobody closed,
// the rest of the file is one record.
const maxRecordBytes = 8 << 20

// A boundedReader answers so many bytes until it is given more.
type boundedReader struct {
	r    io.Reader
	left int
}

func (b *boundedReader) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("一条记录超过 %d 字节，或有引号没有闭合 (a record of more bytes, or a quotation mark without its other one)", maxRecordBytes)
	}
	n, err := b.r.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}

// each reads the file from its beginning and calls fn with each record in order. In the end the file has to be the one that
// was opened.
func (h *historyFile) each(fn func(historyRow) error) error {
	f, err := os.Open(filepath.Join(h.folder, h.name))
	if err != nil {
		return err
	}
	defer f.Close()
	digest := sm3.New()
	whole := io.TeeReader(f, digest)
	bounded := &boundedReader{whole, maxRecordBytes}
	err = h.parse(bounded, func(row historyRow) error {
		bounded.left = maxRecordBytes
		return fn(row)
	})
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, whole); err != nil {
		return err
	}
	if !bytes.Equal(digest.Sum(nil), h.sum[:]) {
		return errors.New("文件在读取期间变了；用不再改动的副本重来 (the file has changed since it was opened: begin again with a copy that stays)")
	}
	return nil
}

// parse calls fn with each record of a file.
func (h *historyFile) parse(r io.Reader, fn func(historyRow) error) error {
	in := bufio.NewReaderSize(r, 64<<10)
	if mark, err := in.Peek(3); err == nil && h.charset == charsetUTF8 && bytes.Equal(mark, []byte("\xef\xbb\xbf")) {
		_, _ = in.Discard(3) // they were peeked at
	}
	if h.m.Format == formatJSON {
		return h.eachJSON(in, fn)
	}
	text := io.Reader(in)
	if h.charset == charsetGB18030 {
		text = transform.NewReader(in, simplifiedchinese.GB18030.NewDecoder()) // what it cannot read is U+FFFD, which no field may hold
	}
	return h.eachCSV(text, fn)
}

func (h *historyFile) eachCSV(text io.Reader, fn func(historyRow) error) error {
	r := csv.NewReader(text)
	r.FieldsPerRecord = -1
	head, err := r.Read()
	if err != nil {
		return fmt.Errorf("没有标题行 (no line of headings): %w", err)
	}
	for i := range head {
		head[i] = strings.TrimSpace(head[i])
	}
	h.head = head
	at := map[string]int{}
	for key, source := range h.m.sources {
		i := slices.Index(head, source)
		if i < 0 {
			return fmt.Errorf("缺少映射中的列“%s”(fields.%s)；文件的列 (columns): %s", source, key, strings.Join(head, "、"))
		}
		if slices.Contains(head[i+1:], source) {
			return fmt.Errorf("列“%s”出现两次 (column given twice)", source)
		}
		at[source] = i
	}
	for {
		cells, err := r.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("无法读出 (malformed): %w", err)
		}
		line, _ := r.FieldPos(0)
		row := historyRow{line: line, raw: cells, get: func(source string) string {
			if i := at[source]; i < len(cells) {
				return cells[i]
			}
			return ""
		}}
		if err := fn(row); err != nil {
			return err
		}
	}
}

func (h *historyFile) eachJSON(in *bufio.Reader, fn func(historyRow) error) error {
	h.head = []string{"record"}
	dec := json.NewDecoder(in)
	array := false
	for {
		b, err := in.Peek(1)
		if err != nil {
			return errors.New("文件是空的 (empty)")
		}
		if strings.IndexByte(" \t\r\n", b[0]) < 0 {
			array = b[0] == '['
			break
		}
		_, _ = in.Discard(1) // it was peeked at
	}
	if array {
		if _, err := dec.Token(); err != nil {
			return fmt.Errorf("无法读出 (malformed): %w", err)
		}
	}
	for n := 1; ; n++ {
		if array && !dec.More() {
			_, err := dec.Token()
			if err == nil {
				if _, err = dec.Token(); errors.Is(err, io.EOF) {
					return nil
				}
				err = errors.New("数组之后还有内容 (something follows the array)")
			}
			return fmt.Errorf("无法读出 (malformed): %w", err)
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); errors.Is(err, io.EOF) && !array {
			return nil
		} else if err != nil {
			return fmt.Errorf("第 %d 条之后无法读出 (malformed after record %d): %w", n-1, n-1, err)
		}
		var object map[string]any
		one := json.NewDecoder(bytes.NewReader(raw))
		one.UseNumber()
		if err := one.Decode(&object); err != nil || object == nil {
			return fmt.Errorf("第 %d 条不是对象 (record %d is no object)", n, n)
		}
		row := historyRow{line: n, raw: []string{string(raw)}, get: func(source string) string { return member(object, source) }}
		if err := fn(row); err != nil {
			return err
		}
	}
}

// member is the text of a member: "a.b" is b of the object a. What is no text, number or truth value is none.
func member(object map[string]any, path string) string {
	name, rest, nested := strings.Cut(path, ".")
	v, ok := object[path]
	if !ok && nested {
		inner, _ := object[name].(map[string]any)
		return member(inner, rest)
	}
	switch v := v.(type) {
	case string:
		return v
	case json.Number:
		return v.String()
	case bool:
		return fmt.Sprint(v)
	}
	return ""
}
