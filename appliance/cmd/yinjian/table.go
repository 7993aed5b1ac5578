package main

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"
)

// Limits of a table: a large hospital has some ten thousand members of staff.
const (
	maxTableBytes = 8 << 20
	maxTableRows  = 20_000
	maxCellBytes  = 4096
)

// A column of a table with the headings that it goes by, in lower case; the first is shown to people.
type column struct {
	name     string // how rows are asked
	headings []string
	required bool
}

// A row is one line of a table: the cells by column name, and where it stands.
type row struct {
	line  int
	cells map[string]string
	raw   []string // all cells, as they came
}

// readTable reads a CSV file (RFC 4180) with a line of headings: UTF-8, with or without a byte order mark. Columns may
// stand in any order; ignored names those that are none of ours. Cells lose the white space around them, and empty lines
// are passed over. Another character set is refused, since names would be misread.
func readTable(data []byte, columns []column) (rows []row, ignored []string, err error) {
	if len(data) > maxTableBytes {
		return nil, nil, fmt.Errorf("表格 %d 字节，至多 %d (table too large)", len(data), maxTableBytes)
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if !utf8.Valid(data) {
		return nil, nil, errors.New("表格不是 UTF-8：可能是 GBK，请在 Excel 中“另存为 CSV UTF-8”后重试 (not UTF-8, GBK perhaps: save it as “CSV UTF-8”)")
	}
	r := csv.NewReader(bytes.NewReader(data))
	r.FieldsPerRecord = -1
	head, err := r.Read()
	if err != nil {
		return nil, nil, fmt.Errorf("表格没有标题行 (no line of headings): %w", err)
	}
	at := make([]string, len(head)) // column names by position
	for i, h := range head {
		h = strings.ToLower(strings.TrimSpace(h))
		j := slices.IndexFunc(columns, func(c column) bool { return slices.Contains(c.headings, h) })
		switch {
		case j < 0:
			ignored = append(ignored, h)
		case slices.Contains(at, columns[j].name):
			return nil, nil, fmt.Errorf("列“%s”出现两次 (column given twice)", columns[j].headings[0])
		default:
			at[i] = columns[j].name
		}
	}
	for _, c := range columns {
		if c.required && !slices.Contains(at, c.name) {
			return nil, nil, fmt.Errorf("缺少列“%s”(column missing; 可写作 %s)", c.headings[0], strings.Join(c.headings, "、"))
		}
	}
	for {
		cells, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, nil, fmt.Errorf("表格无法读出 (malformed): %w", err)
		}
		line, _ := r.FieldPos(0)
		one := row{line: line, cells: map[string]string{}, raw: cells}
		empty := true
		for i, v := range cells {
			v = strings.TrimSpace(v)
			if len(v) > maxCellBytes {
				return nil, nil, fmt.Errorf("第 %d 行有超过 %d 字节的单元格 (cell too long)", line, maxCellBytes)
			}
			empty = empty && v == ""
			if i < len(at) && at[i] != "" {
				one.cells[at[i]] = v
			}
		}
		if empty {
			continue
		}
		if len(rows) == maxTableRows {
			return nil, nil, fmt.Errorf("表格超过 %d 行，请分批 (more than %d rows; split it)", maxTableRows, maxTableRows)
		}
		rows = append(rows, one)
	}
	if len(rows) == 0 {
		return nil, nil, errors.New("表格没有数据行 (no rows)")
	}
	return rows, ignored, nil
}

// loadTable is readTable for a file. Ignored columns are told on stderr.
func loadTable(name string, columns []column) ([]row, error) {
	data, err := readLimited(name, maxTableBytes)
	if err != nil {
		return nil, err
	}
	rows, ignored, err := readTable(data, columns)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(ignored) > 0 {
		fmt.Fprintf(os.Stderr, "忽略的列 (columns ignored): %s\n", strings.Join(ignored, "、"))
	}
	return rows, nil
}

// readLimited reads a file of at most limit bytes.
func readLimited(name string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe is not waited for
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("文件不存在 (no such file): %w", err)
	case err != nil:
		return nil, fmt.Errorf("文件打不开 (cannot be opened): %w", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.IsDir() {
		return nil, fmt.Errorf("%s: 是文件夹，不是文件 (a folder, not a file)", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: 超过 %d 字节 (larger than %d bytes)", name, limit, limit)
	}
	return b, err
}

// inert puts what a spreadsheet would compute behind an apostrophe: names come from other people's tables.
func inert(cells []string) []string {
	cells = slices.Clone(cells)
	for i, cell := range cells {
		if strings.IndexAny(cell, "=+-@＝＋－＠\t\r\n") == 0 {
			cells[i] = "'" + cell
		}
	}
	return cells
}

// tableText is a CSV file that spreadsheets read as UTF-8. Its cells are [inert].
func tableText(lines [][]string) ([]byte, error) {
	b := bytes.NewBufferString("\xef\xbb\xbf")
	w := csv.NewWriter(b)
	for _, line := range lines {
		if err := w.Write(inert(line)); err != nil {
			return nil, err
		}
	}
	w.Flush()
	return b.Bytes(), w.Error()
}

// writeTable writes a table. It replaces an earlier one as a whole.
func writeTable(name string, lines [][]string) error {
	b, err := tableText(lines)
	if err != nil {
		return err
	}
	return replaceFile(name, b)
}

// replaceFile writes under a temporary name first, so that an interruption leaves the old file or the new one.
func replaceFile(name string, data []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // gone already after the rename
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
