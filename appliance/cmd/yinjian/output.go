package main

import (
	"fmt"
	"io"
	"sort"
	"strings"
	"unicode"
)

// printValue shows decoded JSON as indented lines. Long words (certificates, keys) are cut: -o json has
// them whole. Sentences are not: what to do often stands at their end.
func printValue(w io.Writer, indent string, v any) {
	switch v := v.(type) {
	case map[string]any:
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			switch child := v[k].(type) {
			case map[string]any, []any:
				fmt.Fprintf(w, "%s%s:\n", indent, k)
				printValue(w, indent+"  ", child)
			default:
				fmt.Fprintf(w, "%s%s: %s\n", indent, k, short(child))
			}
		}
	case []any:
		if len(v) == 0 {
			fmt.Fprintf(w, "%s（无 none）\n", indent)
		}
		for i, child := range v {
			switch child.(type) {
			case map[string]any, []any:
				fmt.Fprintf(w, "%s[%d]\n", indent, i+1)
				printValue(w, indent+"  ", child)
			default:
				fmt.Fprintf(w, "%s- %s\n", indent, short(child))
			}
		}
	default:
		fmt.Fprintf(w, "%s%s\n", indent, short(v))
	}
}

func short(v any) string {
	s := fmt.Sprint(v)
	if r := []rune(s); len(r) > 160 && !strings.ContainsFunc(s, unicode.IsSpace) {
		return string(r[:120]) + fmt.Sprintf("…（共 %d 字，-o json 看全部）", len(r))
	}
	return s
}
