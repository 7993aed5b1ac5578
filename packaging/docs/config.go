package main

import (
	"bytes"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const keysBegin, keysEnd = "<!-- keys -->\n", "<!-- /keys -->\n"

// writeConfiguration writes the page with its tables anew: the keys, what they mean and their defaults are the comments of
// appliance's configuration, from Config down. A field that is a key needs a comment whose last line is “缺省：” and the default.
func writeConfiguration(w io.Writer, root string) error {
	page, err := os.ReadFile(filepath.Join(root, "docs", "configuration.md"))
	if err != nil {
		return err
	}
	head, rest, ok := bytes.Cut(page, []byte(keysBegin))
	_, tail, ok2 := bytes.Cut(rest, []byte(keysEnd))
	if !ok || !ok2 {
		return fmt.Errorf("docs/configuration.md has no %q and %q", keysBegin, keysEnd)
	}
	tables, err := keyTables(filepath.Join(root, "appliance"))
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s%s%s%s%s", head, keysBegin, tables, keysEnd, tail)
	return err
}

// A keyWalk collects the rows of each table of the configuration.
type keyWalk struct {
	structs map[string]*ast.StructType
	shown   map[string]string // path by name of struct, of those that rows stand for
	out     bytes.Buffer
	errs    []error
}

func keyTables(dir string) (string, error) {
	k := keyWalk{structs: map[string]*ast.StructType{}, shown: map[string]string{}}
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return "", err
	}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return "", err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if t, ok := n.(*ast.TypeSpec); ok {
				if s, ok := t.Type.(*ast.StructType); ok {
					k.structs[t.Name.Name] = s
				}
			}
			return true
		})
	}
	if k.structs["Config"] == nil {
		return "", errors.New("appliance has no Config")
	}
	k.table("顶层 (top level)", "", "Config")
	return k.out.String(), errors.Join(k.errs...)
}

// table writes the keys of one struct, and then those of the structs in it.
func (k *keyWalk) table(title, path, name string) {
	type below struct{ path, name string }
	var rows []string
	var next []below
	for _, f := range k.structs[name].Fields.List {
		if f.Tag == nil || len(f.Names) != 1 {
			continue
		}
		tag, _ := strconv.Unquote(f.Tag.Value)
		key, _, _ := strings.Cut(reflect.StructTag(tag).Get("toml"), ",")
		if key == "" {
			continue
		}
		key = strings.TrimPrefix(path+"."+key, ".")
		elem, kind := f.Type, ""
		switch t := f.Type.(type) {
		case *ast.StarExpr:
			elem = t.X
		case *ast.ArrayType:
			elem, kind = t.Elt, "[]"
		case *ast.MapType:
			elem, kind = t.Value, ".<名称>"
		}
		if id, ok := elem.(*ast.Ident); ok && k.structs[id.Name] != nil {
			if first, again := k.shown[id.Name]; again {
				rows = append(rows, fmt.Sprintf("| `%s%s.…` | 同 `%s.…` (as there) | 同左 |\n", key, kind, first))
				continue
			}
			k.shown[id.Name] = key + kind
			next = append(next, below{key + kind, id.Name})
			continue
		}
		if kind == ".<名称>" {
			key += kind
		}
		meaning, standard, ok := keyComment(f.Doc)
		if !ok {
			k.errs = append(k.errs, fmt.Errorf("%s (%s.%s): the field's comment has to say what it means and, on its last line, 缺省：…", key, name, f.Names[0].Name))
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s |\n", key, strings.ReplaceAll(meaning, "|", `\|`), standard))
	}
	if len(rows) > 0 {
		fmt.Fprintf(&k.out, "\n### %s\n\n| 键 key | 含义 meaning | 缺省 default |\n| --- | --- | --- |\n%s", title, strings.Join(rows, ""))
	}
	for _, b := range next {
		k.table("`["+b.path+"]`", b.path, b.name)
	}
}

// keyComment is a field's comment in one line, and its default.
func keyComment(doc *ast.CommentGroup) (meaning, standard string, ok bool) {
	text, standard, ok := strings.Cut(strings.TrimSpace(doc.Text()), "\n缺省：")
	for line := range strings.SplitSeq(text, "\n") {
		if last, _ := utf8.DecodeLastRuneInString(meaning); meaning != "" && !unicode.Is(unicode.Han, last) && !strings.ContainsRune("，；。：、）", last) {
			meaning += " "
		}
		meaning += line
	}
	return meaning, standard, ok && !strings.Contains(standard, "\n") && meaning != ""
}
