package dm

import (
	"context"
	"database/sql"
	"fmt"
	"strings"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// Seam is DM8's. code answers the driver's error code; the driver itself is not imported here.
func Seam(code func(error) (int32, bool)) *central.Seam {
	s := &central.Seam{
		Name: "dm", Bytes: "BLOB", ScanBytes: func(b *[]byte) any { return (*LOB)(b) },
		Classify:    func(err error) error { return classify(code, err) },
		TableExists: tableExists, IndexExists: indexExists, Columns: selectColumns, Comments: true, Rights: selectRights,
	}
	s.Settings = func(ctx context.Context, db *sql.DB) ([]central.Setting, error) { return settings(ctx, db, code) }
	return s
}

// The account owns what it uses: its schema bears its name, and DM8 keeps names in upper case.
const (
	tableExists = `SELECT COUNT(*) FROM USER_TABLES WHERE TABLE_NAME = UPPER(?)`
	indexExists = `SELECT COUNT(*) FROM USER_INDEXES WHERE INDEX_NAME = UPPER(?)`

	// Of the views that DM8 has after Oracle's. Never tried on DM8.
	selectColumns = `SELECT LOWER(C.TABLE_NAME), T.COMMENTS, LOWER(C.COLUMN_NAME), CASE WHEN C.DATA_TYPE LIKE 'VARCHAR%' THEN 'VARCHAR(' || C.DATA_LENGTH || ')' ELSE C.DATA_TYPE END, CASE WHEN C.NULLABLE = 'Y' THEN 1 ELSE 0 END, D.COMMENTS FROM USER_TAB_COLUMNS C LEFT JOIN USER_TAB_COMMENTS T ON T.TABLE_NAME = C.TABLE_NAME LEFT JOIN USER_COL_COMMENTS D ON D.TABLE_NAME = C.TABLE_NAME AND D.COLUMN_NAME = C.COLUMN_NAME WHERE C.TABLE_NAME LIKE 'YJ$_%' ESCAPE '$' ORDER BY C.TABLE_NAME, C.COLUMN_ID`

	selectRights = `SELECT GRANTEE, LOWER(TABLE_NAME), PRIVILEGE FROM USER_TAB_PRIVS ORDER BY GRANTEE, TABLE_NAME, PRIVILEGE`

	selectUnicode  = `SELECT SF_GET_UNICODE_FLAG()`
	selectCase     = `SELECT SF_GET_CASE_SENSITIVE_FLAG()`
	selectPageSize = `SELECT SF_GET_PAGE_SIZE()`
	selectINI      = `SELECT PARA_VALUE FROM V$DM_INI WHERE PARA_NAME = ?`
	selectMode     = `SELECT MODE$ FROM V$INSTANCE`
	selectVersion  = `SELECT SVR_VERSION FROM V$INSTANCE`
)

// classify goes by the server's codes, as Go and Java programs that work with DM8 were read to know them; its text
// depends on the client's language.
func classify(code func(error) (int32, bool), err error) error {
	c, ok := code(err)
	if !ok {
		return fmt.Errorf("%w: %v", dbdriver.ErrUnavailable, err)
	}
	switch c {
	case -6602, -6610, -6611, -6612: // unique violation
		return fmt.Errorf("%w: %v", dbdriver.ErrConflict, err)
	case -6403, -6407: // deadlock, of which DM8 rolls back the one statement; lock timeout
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrDeadlock, dbdriver.ErrUnavailable, err)
	case -2018, 6091: // write on a standby; the driver found a server of another mode than it was told
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrReadOnly, dbdriver.ErrUnavailable, err)
	case -2103, -2104, -2105, -2106, -2111, -2007: // no such schema, table or view, column; syntax
		return fmt.Errorf("%w: %v", dbdriver.ErrUnfit, err)
	}
	if c <= -5501 && c >= -5999 { // privileges
		return fmt.Errorf("%w: %v", dbdriver.ErrUnfit, err)
	}
	return fmt.Errorf("%w: %v", dbdriver.ErrUnavailable, err)
}

type wish struct {
	name, query string
	arg         []any
	judge       func(value string) (central.Verdict, string)
}

func want(values string, otherwise central.Verdict, why string) func(string) (central.Verdict, string) {
	return func(got string) (central.Verdict, string) {
		for v := range strings.FieldsSeq(values) {
			if v == got {
				return central.Fit, ""
			}
		}
		return otherwise, why
	}
}

// wishes: what dminit and dm.ini fix. Plain accounts may not read V$ views: that is "not checked".
var wishes = []wish{
	{"SVR_VERSION", selectVersion, nil, func(string) (central.Verdict, string) { return central.Fit, "" }},
	{"MODE$", selectMode, nil, want("NORMAL PRIMARY", central.Unfit, "备库只读 (a standby takes no writes)")},
	{"UNICODE_FLAG", selectUnicode, nil, want("1", central.Unfit, "须以 CHARSET=1 (UTF-8) 初始化；缺省的 GB18030 存不下全部汉字的原字节 (dminit CHARSET=1 is wanted, the default GB18030 is not)")},
	{"CASE_SENSITIVE", selectCase, nil, want("1", central.Doubtful, "大小写不分：标识只用小写，仍可用 (case is not told apart; our identifiers are lower-case)")},
	{"PAGE_SIZE", selectPageSize, nil, want("8192 16384 32768", central.Unfit, "页须至少 8K，否则一行放不下 (at least 8K, or a row does not fit)")},
	{"COMPATIBLE_MODE", selectINI, []any{"COMPATIBLE_MODE"}, want("0 3 4", central.Doubtful, "空串可能等于 NULL；本系统不存空串 (empty text may be NULL there; we store none)")},
	{"BLANK_PAD_MODE", selectINI, []any{"BLANK_PAD_MODE"}, want("0 1", central.Doubtful, "未知的取值 (a value that is not known)")},
	{"LENGTH_IN_CHAR", selectINI, []any{"LENGTH_IN_CHAR"}, want("0 1", central.Doubtful, "未知的取值 (a value that is not known)")},
}

func settings(ctx context.Context, db *sql.DB, code func(error) (int32, bool)) ([]central.Setting, error) {
	var out []central.Setting
	for _, w := range wishes {
		s := central.Setting{Name: w.name}
		err := db.QueryRowContext(ctx, w.query, w.arg...).Scan(&s.Value)
		c, server := code(err)
		switch {
		case err == nil:
			s.Verdict, s.Why = w.judge(strings.TrimSpace(s.Value))
			s.ReadOnly = s.Verdict == central.Unfit && w.name == "MODE$"
		case err == sql.ErrNoRows, server && c < 0: // codes of the driver are positive
			s.Verdict, s.Why = central.NotChecked, err.Error()
		default:
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}
