package main

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"

	"golang.org/x/text/encoding/simplifiedchinese"
)

// Character sets of tables. Excel writes what the hospital's Windows has by default, GB18030, unless told otherwise.
const (
	charsetAuto    = "auto"
	charsetUTF8    = "utf-8"
	charsetGB18030 = "gb18030"
)

// toUTF8 answers text as UTF-8 without a byte order mark, and in which character set it was. Under "auto" it is UTF-8 where
// it can be, and else GB18030: text in that set, with headings in Chinese, is never UTF-8 by chance. What is neither, or has
// a character that the set does not know, is refused: a name that is misread is worse than none.
func toUTF8(data []byte, charset string) ([]byte, string, error) {
	switch {
	case charset != charsetAuto && charset != charsetUTF8 && charset != charsetGB18030:
		return nil, "", usageError{fmt.Errorf("--charset 须为 auto、utf-8 或 gb18030，不是 %q (must be one of these)", charset)}
	case bytes.HasPrefix(data, []byte("\xff\xfe")), bytes.HasPrefix(data, []byte("\xfe\xff")):
		return nil, "", errors.New("表格是 UTF-16（“Unicode 文本”）：请在 Excel 中另存为 CSV UTF-8 (UTF-16: save it as “CSV UTF-8”)")
	case charset != charsetGB18030 && bytes.HasPrefix(data, []byte("\xef\xbb\xbf")) && utf8.Valid(data):
		return data[3:], "UTF-8 带 BOM (with a byte order mark)", nil
	case charset != charsetGB18030 && utf8.Valid(data):
		return data, "UTF-8", nil
	case charset == charsetUTF8:
		return nil, "", errors.New("表格不是 UTF-8 (not UTF-8)")
	}
	text, err := simplifiedchinese.GB18030.NewDecoder().Bytes(data)
	if err == nil && bytes.ContainsRune(text, utf8.RuneError) {
		err = errors.New("有不能识别的字节 (bytes of no character)")
	}
	if err != nil {
		return nil, "", fmt.Errorf("表格既不是 UTF-8 也不是 GB18030，请在 Excel 中另存为 CSV UTF-8 (neither UTF-8 nor GB18030: save it as “CSV UTF-8”): %w", err)
	}
	return text, "GB18030（GBK）", nil
}
