package central

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"

	"yinjian/dbdriver"
)

// The data dictionary: what each table and column is for, in the words that the databases keep as comments. A column's
// entry is "table.column", or "*.column" where it means the same everywhere. A test holds it against the migrations: none
// missing, none too many.
var comments = map[string]string{
	"*.node_id":     "写下这一行所据日志的节点（设备）",
	"*.epoch_id":    "日志的纪元：建立或恢复时抽取的 64 位随机数，16 位十六进制",
	"*.seq_no":      "日志条目的序号，从 0 起",
	"*.leaf_hash":   "条目的叶值（SM3，十六进制），日志的 Merkle 树以它为叶",
	"*.kind_name":   "条目的种类",
	"*.bound_us":    "时间的误差上限，微秒",
	"*.row_mac":     "该行的 HMAC-SM3，十六进制；由写入者的密钥计算",
	"*.mac_key_id":  "计算 MAC 的密钥的名称，密钥在密码机内",
	"*.created_by":  "创建人：写入者，shipper/节点 或程序的节点名",
	"*.created_at":  "创建时间，微秒(UTC)，取自设备的可信时间",
	"*.modified_by": "修改人：最后的写入者",
	"*.modified_at": "修改时间，微秒(UTC)，取自设备的可信时间",
	"*.intent_id":   "意图的编号：意图先写入日志，再在中心库决定",
	"*.object_id":   "对象：应用、工号、证书序列号、信任锚标识等",

	"yj_record":                 "日志的每条条目一行：签名、时间戳、管理、时间状态",
	"yj_record.record_id":       "记录号：SM3(应用 ‖ 幂等键)，或条目的其他引用；没有则空",
	"yj_record.application_id":  "应用；没有则空",
	"yj_record.signer_id":       "签名人工号；没有则空",
	"yj_record.department_name": "签署时的科室；没有则空",
	"yj_record.document_type":   "文书类型；没有则空",
	"yj_record.campus_name":     "院区；没有则空",
	"yj_record.signed_at_us":    "条目的时间，微秒(UTC)，可信时间",
	"yj_record.status_code":     "状态：recorded 已记录，test 测试，duplicate 等",

	"yj_batch":           "一同送达的行：每批一个 MAC，首尾相接",
	"yj_batch.first_seq": "该批第一行的序号",
	"yj_batch.last_seq":  "该批最后一行的序号",
	"yj_batch.batch_mac": "该批各行的 HMAC-SM3，十六进制",

	"yj_record_archive": "已归档的行：以前各月的 yj_record，列与键相同，逐行原样移来",
	"yj_batch_archive":  "已归档的批次：以前各月的 yj_batch，列与键相同，逐行原样移来",

	"yj_change":               "变更日志：核心数据的每次变更一行，五要素",
	"yj_change.change_no":     "第几次状态变更，意图也计数，从 0 起",
	"yj_change.act_name":      "动作，如 stop、limit；没有则空",
	"yj_change.actor_name":    "修改人：做这件事的人或程序",
	"yj_change.reason_text":   "原因；没有则空",
	"yj_change.before_text":   "改前：有变化的各项，JSON；新建则空",
	"yj_change.after_text":    "改后：有变化的各项，JSON；删除则空",
	"yj_change.changed_at_us": "修改时间，微秒(UTC)，可信时间",

	"yj_set_root":              "集合根：行有 MAC 的表，按节点一行，删除与回退由此可见",
	"yj_set_root.set_name":     "表名",
	"yj_set_root.root_version": "版本，只增：最后一次写入的时间（微秒），或上一版加一",
	"yj_set_root.entry_count":  "行数",
	"yj_set_root.set_sum":      "各行 MAC 展开后之和，模 2^1024，十六进制",
	"yj_set_root.root_mac":     "集合根的 HMAC-SM3，十六进制",

	"yj_decision":             "两院区须有同一答案的决定：一个对象的每一版本一行，写后不改",
	"yj_decision.object_kind": "对象的种类；spent 为作废的意图",
	"yj_decision.version_no":  "版本",
	"yj_decision.body_sm3":    "所决定内容的 SM3，十六进制；内容在日志中",
	"yj_decision.decided_at":  "决定的时间，微秒(UTC)，可信时间",

	"yj_duplicate":           "两院区各有一份的同一记录（重试到另一院区所致，两份均有效）：签署较晚的一份一行",
	"yj_duplicate.record_id": "两份共同的记录编号",
	"yj_duplicate.of_node":   "签署较早的一份：节点",
	"yj_duplicate.of_epoch":  "签署较早的一份：纪元",
	"yj_duplicate.of_seq":    "签署较早的一份：序号",

	"yj_rebuild":            "正在重建的节点：其各行尚不齐全",
	"yj_rebuild.rebuilt_by": "在哪台设备上重建",
	"yj_rebuild.phase_name": "阶段：emptying 清空，filling 重填",

	"yj_schema_change":               "结构变更：每个已执行的迁移文件一行",
	"yj_schema_change.change_no":     "文件的编号",
	"yj_schema_change.file_name":     "文件名",
	"yj_schema_change.statement_sm3": "语句的 SM3，十六进制",
	"yj_schema_change.review_id":     "评审编号",
}

// A Table is a table of the dictionary.
type Table struct {
	Name    string   `json:"name"`
	Comment string   `json:"comment"`
	Columns []Column `json:"columns"`
	Key     []string `json:"key"` // the primary key's columns
	Indexes []string `json:"indexes"`
}

// A Column is a column of the dictionary. Lengths are bytes.
type Column struct {
	Name     string `json:"name"`
	Type     string `json:"type"` // BIGINT, SMALLINT, VARCHAR(n)
	Nullable bool   `json:"nullable"`
	Comment  string `json:"comment"`
}

// Dictionary describes the tables that the migrations make, in their order, the list of migrations last. It fails where a
// table or column has no words.
func Dictionary() ([]Table, error) {
	files, err := parseMigrations(migrationFiles)
	if err != nil {
		return nil, err
	}
	var out []Table
	texts := make([]string, 0, len(files)+1)
	for _, m := range files {
		texts = append(texts, m.text)
	}
	for _, text := range append(texts, createHistory.Text) {
		words := strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(" (),", r) })
		if words[0] == "ALTER" { // ALTER TABLE table ADD column type
			i := slices.IndexFunc(out, func(t Table) bool { return t.Name == words[2] })
			if i < 0 {
				return nil, fmt.Errorf("%w: a column of %s, which is not there", dbdriver.ErrUnfit, words[2])
			}
			c, err := columnOf(words[2], strings.SplitN(text, " ", 5)[4])
			if err != nil {
				return nil, err
			}
			out[i].Columns = append(out[i].Columns, c)
			continue
		}
		if words[1] != "TABLE" { // CREATE [UNIQUE] INDEX name ON table (…)
			on := slices.Index(words, "ON")
			if i := slices.IndexFunc(out, func(t Table) bool { return t.Name == words[on+1] }); i >= 0 {
				unique := ""
				if words[1] == "UNIQUE" {
					unique = "唯一 (unique) "
				}
				out[i].Indexes = append(out[i].Indexes, unique+words[on-1]+" ("+strings.Join(words[on+2:], ", ")+")")
			}
			continue
		}
		t, err := tableOf(text)
		if err != nil {
			return nil, err
		}
		out = append(out, t)
	}
	return out, nil
}

// tableOf reads a CREATE TABLE as the migrations write it.
func tableOf(text string) (Table, error) {
	head, body, _ := strings.Cut(text, " (")
	t := Table{Name: strings.TrimPrefix(head, "CREATE TABLE ")}
	body, key, ok := strings.Cut(body, ", PRIMARY KEY (")
	if !ok {
		return t, fmt.Errorf("%w: table %s has no primary key", dbdriver.ErrUnfit, t.Name)
	}
	t.Key = strings.Split(strings.TrimSuffix(key, "))"), ", ")
	t.Comment = comments[t.Name]
	for _, line := range strings.Split(body, ", ") {
		c, err := columnOf(t.Name, line)
		if err != nil {
			return t, err
		}
		t.Columns = append(t.Columns, c)
	}
	return t, nil
}

// columnOf reads a column of a table as the migrations write it.
func columnOf(table, line string) (Column, error) {
	word := strings.Fields(line)
	c := Column{Name: word[0], Type: word[1], Nullable: !strings.Contains(line, " NOT NULL")}
	if c.Comment = comments[strings.TrimSuffix(table, "_archive")+"."+c.Name]; c.Comment == "" { // an archive has its table's columns
		c.Comment = comments["*."+c.Name]
	}
	if c.Comment == "" || comments[table] == "" {
		return c, fmt.Errorf("%w: the dictionary has no words for %s.%s", dbdriver.ErrUnfit, table, c.Name)
	}
	return c, nil
}

// live reads the tables of the database whose names begin with ours.
func live(ctx context.Context, db *sql.DB, seam *Seam) (map[string]*Table, error) {
	rows, err := db.QueryContext(ctx, seam.Columns)
	if err != nil {
		return nil, fmt.Errorf("central database: its columns: %w", classify(seam, err))
	}
	defer rows.Close()
	out := map[string]*Table{}
	for rows.Next() {
		var table, column, typ string
		var nullable int
		var tableComment, comment sql.NullString
		if err := rows.Scan(&table, &tableComment, &column, &typ, &nullable, &comment); err != nil {
			return nil, fmt.Errorf("central database: its columns: %w", classify(seam, err))
		}
		if out[table] == nil {
			out[table] = &Table{Name: table, Comment: tableComment.String}
		}
		typ = strings.ToUpper(typ)
		for _, alias := range []struct{ theirs, ours string }{{"CHARACTER VARYING", "VARCHAR"}, {"VARCHAR2", "VARCHAR"}} {
			typ = strings.Replace(typ, alias.theirs, alias.ours, 1)
		}
		out[table].Columns = append(out[table].Columns, Column{column, typ, nullable != 0, comment.String})
	}
	return out, classify(seam, rows.Err())
}

// Describe gives the database's tables and columns the dictionary's words, where it keeps words: those that it has already
// are left. It may be called at any time and by several at once.
func Describe(ctx context.Context, db *sql.DB, seam *Seam) error {
	if !seam.Comments {
		return nil
	}
	want, err := Dictionary()
	if err != nil {
		return err
	}
	have, err := live(ctx, db, seam)
	if err != nil {
		return err
	}
	var todo []string
	say := func(what, words string) {
		todo = append(todo, "COMMENT ON "+what+" IS '"+words+"'") // no words have a quotation mark
	}
	for _, t := range want {
		h := have[t.Name]
		if h == nil {
			continue // of a later release, or made just now
		}
		if h.Comment != t.Comment {
			say("TABLE "+t.Name, t.Comment)
		}
		for _, c := range t.Columns {
			if i := slices.IndexFunc(h.Columns, func(o Column) bool { return o.Name == c.Name }); i >= 0 && h.Columns[i].Comment != c.Comment {
				say("COLUMN "+t.Name+"."+c.Name, c.Comment)
			}
		}
	}
	if len(todo) == 0 {
		return nil
	}
	return inTx(ctx, db, seam, func(tx *sql.Tx) error { // of which DM8 makes as many as there are statements
		for _, q := range todo {
			if _, err := tx.ExecContext(ctx, q); err != nil {
				return err
			}
		}
		return nil
	})
}

// A Deviation is where the database's tables are not those of the dictionary.
type Deviation struct {
	Kind   string `json:"kind"` // "missing", "extra", "type", "null", "comment"
	Table  string `json:"table"`
	Column string `json:"column,omitempty"` // "": the table
	Want   string `json:"want,omitempty"`
	Got    string `json:"got,omitempty"`
}

// DiffDictionary names every table and column (whose name begins with yj_, of tables) that is missing, too many, or of
// another type or nullability, and words that differ, where the database keeps them.
func DiffDictionary(ctx context.Context, db *sql.DB, seam *Seam) ([]Deviation, error) {
	want, err := Dictionary()
	if err != nil {
		return nil, err
	}
	have, err := live(ctx, db, seam)
	if err != nil {
		return nil, err
	}
	out := []Deviation{}
	for _, t := range want {
		h := have[t.Name]
		if h == nil {
			out = append(out, Deviation{Kind: "missing", Table: t.Name})
			continue
		}
		delete(have, t.Name)
		if seam.Comments && h.Comment != t.Comment {
			out = append(out, Deviation{"comment", t.Name, "", t.Comment, h.Comment})
		}
		for _, c := range t.Columns {
			i := slices.IndexFunc(h.Columns, func(o Column) bool { return o.Name == c.Name })
			if i < 0 {
				out = append(out, Deviation{Kind: "missing", Table: t.Name, Column: c.Name, Want: c.Type})
				continue
			}
			got := h.Columns[i]
			h.Columns = slices.Delete(h.Columns, i, i+1)
			if got.Type != c.Type {
				out = append(out, Deviation{"type", t.Name, c.Name, c.Type, got.Type})
			}
			if got.Nullable != c.Nullable {
				out = append(out, Deviation{"null", t.Name, c.Name, nullWords[c.Nullable], nullWords[got.Nullable]})
			}
			if seam.Comments && got.Comment != c.Comment {
				out = append(out, Deviation{"comment", t.Name, c.Name, c.Comment, got.Comment})
			}
		}
		for _, c := range h.Columns {
			out = append(out, Deviation{Kind: "extra", Table: t.Name, Column: c.Name, Got: c.Type})
		}
	}
	var names []string
	for name := range have {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		out = append(out, Deviation{Kind: "extra", Table: name})
	}
	return out, nil
}

var nullWords = map[bool]string{true: "NULL", false: "NOT NULL"}

// Schema is the statements that make the tables, in seam's form, each ended by a semicolon and a line.
func Schema(seam *Seam) (string, error) {
	files, err := parseMigrations(migrationFiles)
	if err != nil {
		return "", err
	}
	out := createHistory.Text + ";\n"
	for _, m := range files {
		out += m.text + ";\n"
	}
	return seam.Text(out), nil
}

// A Right is what an account may do in the database.
type Right struct {
	Account string // of the database server
	Object  string // a table, or "" for the server itself
	Right   string
}

// Rights lists the accounts that the server tells of, and what they may do with our tables. Databases without accounts of
// their own (SQLite) answer none.
func Rights(ctx context.Context, db *sql.DB, seam *Seam) ([]Right, error) {
	if seam.Rights == "" {
		return nil, nil
	}
	rows, err := db.QueryContext(ctx, seam.Rights)
	if err != nil {
		return nil, fmt.Errorf("central database: its rights: %w", classify(seam, err))
	}
	defer rows.Close()
	var out []Right
	for rows.Next() {
		var r Right
		if err := rows.Scan(&r.Account, &r.Object, &r.Right); err != nil {
			return nil, fmt.Errorf("central database: its rights: %w", classify(seam, err))
		}
		out = append(out, r)
	}
	return out, classify(seam, rows.Err())
}
