package dm

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// A LOB scans a column of bytes. DM8's driver hands BLOBs and long texts as objects of its own, of which only the
// methods are known here: a reader, or a text with a length and positions that begin at 1.
type LOB []byte

// maxLOB bounds what is read into memory.
const maxLOB = 64 << 20

// Scan implements sql.Scanner.
func (l *LOB) Scan(v any) error {
	switch v := v.(type) {
	case nil:
		*l = nil
	case []byte:
		*l = append([]byte{}, v...)
	case string:
		*l = LOB(v)
	case io.Reader:
		b, err := io.ReadAll(io.LimitReader(v, maxLOB+1))
		if err != nil {
			return fmt.Errorf("dm: reading a BLOB: %w", err)
		}
		if len(b) > maxLOB {
			return errors.New("dm: a BLOB is too long")
		}
		*l = b
	case interface {
		GetLength() (int64, error)
		ReadString(pos, length int) (string, error)
	}:
		n, err := v.GetLength()
		if err != nil || n > maxLOB {
			return fmt.Errorf("dm: a CLOB of %d characters: %w", n, err)
		}
		var text strings.Builder
		for at := 1; int64(at) <= n; { // less than was asked for may come
			part, err := v.ReadString(at, int(n)-at+1)
			if err != nil {
				return fmt.Errorf("dm: reading a CLOB: %w", err)
			}
			if part == "" {
				return errors.New("dm: a CLOB ends early")
			}
			text.WriteString(part)
			at += len([]rune(part))
		}
		*l = LOB(text.String())
	default:
		return fmt.Errorf("dm: a column of bytes came as %T", v)
	}
	return nil
}
