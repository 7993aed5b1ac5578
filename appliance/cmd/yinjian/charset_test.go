package main

import (
	"strings"
	"testing"

	"golang.org/x/text/encoding/simplifiedchinese"
)

func TestCharsets(t *testing.T) {
	t.Parallel()
	const text = "工号,姓名\r\nD001,𠮷田㐂\r\n" // characters of two and four bytes in GB18030
	gb, err := simplifiedchinese.GB18030.NewEncoder().String(text)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ data, charset, said string }{
		"UTF-8":            {text, charsetAuto, "UTF-8"},
		"UTF-8, mark":      {"\xef\xbb\xbf" + text, charsetAuto, "UTF-8 带 BOM"},
		"GB18030":          {gb, charsetAuto, "GB18030"},
		"GB18030, told":    {gb, charsetGB18030, "GB18030"},
		"UTF-8, told":      {text, charsetUTF8, "UTF-8"},
		"GBK of one word":  {"\xc1\xaa\xcd\xa8", charsetAuto, "GB18030"}, // 联通, which some programs take for UTF-8
		"plain":            {"id,name\n", charsetAuto, "UTF-8"},
		"plain as GB18030": {"id,name\n", charsetGB18030, "GB18030"},
	} {
		want := strings.TrimPrefix(c.data, "\xef\xbb\xbf")
		switch c.data {
		case gb:
			want = text
		case "\xc1\xaa\xcd\xa8":
			want = "联通"
		}
		if got, said, err := toUTF8([]byte(c.data), c.charset); err != nil || string(got) != want || !strings.HasPrefix(said, c.said) {
			t.Errorf("%s: %q, %s, %v", name, got, said, err)
		}
	}
	for name, c := range map[string]struct{ data, charset, want string }{
		"UTF-16":          {"\xff\xfeD\x00", charsetAuto, "UTF-16"},
		"neither":         {text + "\xff\xff", charsetAuto, "GB18030"},
		"cut short":       {gb[:len(gb)-3] + "\x81", charsetAuto, "GB18030"},
		"GB18030 as told": {gb, charsetUTF8, "不是 UTF-8"},
		"unknown":         {text, "big5", "--charset"},
	} {
		if got, _, err := toUTF8([]byte(c.data), c.charset); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
