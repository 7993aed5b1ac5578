package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"yinjian/appliance"
	"yinjian/dbdriver/central"
	"yinjian/dbdriver/connect"
)

func databaseDictionaryCommand() *cobra.Command {
	var dir, dsn, passwordFile, format, out string
	var diff bool
	c := &cobra.Command{
		Use:   "dictionary [--format md|csv|json] [--out FILE] | dictionary --diff (--dir DIR | --dsn DSN)",
		Short: "数据字典：中心库的每张表与每一列；与实际的库对照 (the data dictionary, and where a database departs from it)",
		Long: `写出中心库全部表与列的中文说明、类型、主键、索引，由程序的建表语句与说明生成，与 docs/data-dictionary.md 相同。
--diff 与一个实际的库对照：多出的、缺少的、类型不同的列，以及 (PostgreSQL、DM) COMMENT ON 的说明不同的，逐一指出。退出码 0 一致，1 有不同。
(Writes the dictionary; with --diff holds a database against it: exit 0 if they agree, 1 if not.)`,
		Args: exactArgs(0),
		RunE: func(c *cobra.Command, _ []string) error {
			if !diff {
				if dir != "" || dsn != "" {
					return usageError{errors.New("--dir、--dsn 与 --diff 同用 (go with --diff)")}
				}
				var b bytes.Buffer
				if err := writeDictionary(&b, format); err != nil {
					return err
				}
				if out != "" {
					return replaceFile(out, b.Bytes())
				}
				_, err := os.Stdout.Write(b.Bytes())
				return err
			}
			if (dsn == "") == (dir == "") || dsn == "" && passwordFile != "" {
				return usageError{errors.New("给出 --dsn，或 --dir (give --dsn, or --dir)")}
			}
			d := appliance.Database{DSN: dsn, PasswordFile: passwordFile}
			if dir != "" {
				cfg, err := appliance.LoadConfig(dir)
				if err != nil {
					return err
				}
				d = cfg.Database
			}
			place, err := d.Place(dir)
			if err == nil {
				err = connect.Check(place.DSN)
			}
			if err != nil {
				return err
			}
			db, seam, err := connect.DB(place)
			if err != nil {
				return err
			}
			defer db.Close()
			found, err := central.DiffDictionary(c.Context(), db, seam)
			if err != nil {
				return err
			}
			for _, f := range found {
				where := f.Table
				if f.Column != "" {
					where += "." + f.Column
				}
				fmt.Printf("  ✗ %s：%s", where, deviationWords[f.Kind])
				if f.Want != "" {
					fmt.Printf("，字典 dictionary %s", f.Want)
				}
				if f.Got != "" {
					fmt.Printf("，库 database %s", f.Got)
				}
				fmt.Println()
			}
			if len(found) > 0 {
				return errFound
			}
			fmt.Println("结论 result: 库与数据字典一致 (the database is as the dictionary says)")
			return nil
		},
	}
	f := c.Flags()
	f.BoolVar(&diff, "diff", false, "与一个实际的库对照 (hold a database against it)")
	f.StringVar(&dir, "dir", "", "设备目录：其配置的库 (an appliance's folder: its database)")
	f.StringVar(&dsn, "dsn", "", "库在哪里，见 docs/database.md (where the database is)")
	f.StringVar(&passwordFile, "password-file", "", "口令文件，权限 600 (file with the password)")
	f.StringVar(&format, "format", "md", "md、csv 或 json (md, csv or json)")
	f.StringVar(&out, "out", "", "写入文件 (write a file)")
	return c
}

var deviationWords = map[string]string{
	"missing": "缺少 (missing)", "extra": "字典中没有 (not in the dictionary)", "type": "类型不同 (another type)", "null": "可空与否不同 (NULL or not)", "comment": "说明不同 (other words)",
}

// writeDictionary writes the dictionary as Markdown, CSV with a byte order mark, or JSON.
func writeDictionary(w io.Writer, format string) error {
	tables, err := central.Dictionary()
	if err != nil {
		return err
	}
	optional := map[bool]string{true: "可空", false: ""}
	switch format {
	case "json":
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(tables)
	case "csv":
		if _, err := io.WriteString(w, "\xef\xbb\xbf"); err != nil {
			return err
		}
		c := csv.NewWriter(w)
		lines := [][]string{{"表", "表说明", "列", "类型", "可空", "主键", "说明"}}
		for _, t := range tables {
			for _, col := range t.Columns {
				key := ""
				for i, k := range t.Key {
					if k == col.Name {
						key = fmt.Sprint(i + 1)
					}
				}
				lines = append(lines, []string{t.Name, t.Comment, col.Name, col.Type, optional[col.Nullable], key, col.Comment})
			}
		}
		return c.WriteAll(lines)
	case "md":
	default:
		return usageError{fmt.Errorf("--format %s：须为 md、csv 或 json (md, csv or json)", format)}
	}
	fmt.Fprint(w, "# 数据字典 (data dictionary)\n\n由 `yinjian db dictionary` 生成，勿手工修改。中心库的表；日志的文件格式见 [evidence.md](evidence.md)。长度为字节；时间为微秒(UTC)；空缺的文本为 NULL，从不存空串。\n"+
		"(Generated. Lengths are bytes, times are microseconds UTC, absent text is NULL.)\n")
	for _, t := range tables {
		fmt.Fprintf(w, "\n## %s\n\n%s。主键：%s。", t.Name, t.Comment, strings.Join(t.Key, "、"))
		if len(t.Indexes) > 0 {
			fmt.Fprintf(w, "索引：%s。", strings.Join(t.Indexes, "；"))
		}
		fmt.Fprint(w, "\n\n| 列 | 类型 | 可空 | 说明 |\n| --- | --- | --- | --- |\n")
		for _, c := range t.Columns {
			fmt.Fprintf(w, "| `%s` | %s | %s | %s |\n", c.Name, c.Type, optional[c.Nullable], c.Comment)
		}
	}
	return nil
}
