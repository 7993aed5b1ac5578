// Package postgres opens the central database on PostgreSQL and on what speaks its wire (KingbaseES, openGauss), with
// pgx. Tried on PostgreSQL; on the others nobody has yet.
package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"yinjian/dbdriver"
	"yinjian/dbdriver/central"
)

// A Config says where the database is.
type Config struct {
	// DSN is a URL (postgres://user@host:port/name?…) or words (host=… dbname=…), as libpq takes them, without a password.
	// Several hosts are a primary and its standbys: the one that takes writes is used. Unless it says otherwise, sslmode is
	// verify-full for servers on other machines.
	DSN      string
	Password string
	Now      func() time.Time // for certificates; nil: the system's
}

const (
	connectTimeout = 5 * time.Second // one dead node of several must not hold up the others for long
	maxOpen        = 8
	lifetime       = 10 * time.Minute
	idleTime       = 2 * time.Minute // below what firewalls between campuses allow
)

var rePassword = regexp.MustCompile(`(?i)password\s*=`)

// parse reads the DSN. What it says of the way to the server is for the report.
func parse(c Config) (*pgx.ConnConfig, central.Setting, error) {
	way := central.Setting{Name: "transport", Verdict: central.Fit}
	dsn := strings.TrimSpace(c.DSN)
	isURL := strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")
	secret := rePassword.MatchString(dsn)
	if isURL {
		u, err := url.Parse(dsn)
		if err != nil {
			return nil, way, fmt.Errorf("%w: DSN 不是有效的 URL (is no URL)", dbdriver.ErrUnfit) // the cause may show a password
		}
		_, has := u.User.Password()
		secret = secret || has
	}
	if secret {
		return nil, way, fmt.Errorf("%w: DSN 中不得写口令，请用 password_file (the password belongs into a file)", dbdriver.ErrUnfit)
	}
	cfg, err := pgx.ParseConfig(dsn)
	if err != nil {
		return nil, way, fmt.Errorf("%w: DSN: %v", dbdriver.ErrUnfit, err)
	}
	if !strings.Contains(dsn, "sslmode") && !local(cfg) {
		switch {
		case !isURL:
			dsn += " sslmode=verify-full"
		case strings.Contains(dsn, "?"):
			dsn += "&sslmode=verify-full"
		default:
			dsn += "?sslmode=verify-full"
		}
		if cfg, err = pgx.ParseConfig(dsn); err != nil {
			return nil, way, fmt.Errorf("%w: DSN: %v", dbdriver.ErrUnfit, err)
		}
	}
	switch {
	case local(cfg):
		way.Value = "本机 (this machine)"
	case strings.Contains(dsn, "sslmode=verify-full"):
		way.Value = "TLS, verify-full"
	default:
		way.Value, way.Verdict = "sslmode 不是 verify-full (is not verify-full)", central.Doubtful
		way.Why = "服务器身份未经核验，线路上的人可读可改 (whoever is on the line can be the server)"
	}
	cfg.Password = c.Password // and nothing from the environment
	if cfg.TLSConfig != nil {
		cfg.TLSConfig.Time = c.Now
	}
	for _, f := range cfg.Fallbacks {
		if f.TLSConfig != nil {
			f.TLSConfig.Time = c.Now
		}
		if f.Host != cfg.Host && cfg.ValidateConnect == nil {
			cfg.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
		}
	}
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = connectTimeout
	}
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	if cfg.RuntimeParams["application_name"] == "" {
		cfg.RuntimeParams["application_name"] = "yinjian"
	}
	return cfg, way, nil
}

// Check looks at a DSN without connecting.
func Check(dsn string) error {
	_, _, err := parse(Config{DSN: dsn})
	return err
}

func local(cfg *pgx.ConnConfig) bool {
	is := func(host string) bool {
		ip := net.ParseIP(host)
		return strings.HasPrefix(host, "/") || host == "localhost" || ip != nil && ip.IsLoopback()
	}
	for _, f := range cfg.Fallbacks {
		if !is(f.Host) {
			return false
		}
	}
	return is(cfg.Host)
}

// DB opens a pool, which connects at its first use, and the seam for it.
func DB(c Config) (*sql.DB, *central.Seam, error) {
	cfg, way, err := parse(c)
	if err != nil {
		return nil, nil, err
	}
	db := stdlib.OpenDB(*cfg)
	db.SetMaxOpenConns(maxOpen)
	db.SetConnMaxLifetime(lifetime)
	db.SetConnMaxIdleTime(idleTime)
	seam := Seam()
	seam.Settings = func(ctx context.Context, db *sql.DB) ([]central.Setting, error) {
		s, err := settings(ctx, db)
		return append([]central.Setting{way}, s...), err
	}
	return db, seam, nil
}

// Seam is that of PostgreSQL's wire.
func Seam() *central.Seam {
	return &central.Seam{
		Name: "postgres", Bytes: "BYTEA", Rebind: central.Dollar, Classify: classify,
		TableExists: tableExists, IndexExists: indexExists,
		Columns: selectColumns, Comments: true, Rights: selectRights, Settings: settings,
	}
}

// pg_table_is_visible: found by the search path, as in the registry's statements.
const (
	tableExists    = `SELECT COUNT(*) FROM pg_catalog.pg_class WHERE relname = $1 AND relkind IN ('r', 'p') AND pg_catalog.pg_table_is_visible(oid)`
	indexExists    = `SELECT COUNT(*) FROM pg_catalog.pg_class WHERE relname = $1 AND relkind IN ('i', 'I') AND pg_catalog.pg_table_is_visible(oid)`
	selectColumns  = `SELECT c.relname, obj_description(c.oid, 'pg_class'), a.attname, format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 0 ELSE 1 END, col_description(c.oid, a.attnum) FROM pg_catalog.pg_class c JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid WHERE c.relkind IN ('r', 'p') AND a.attnum > 0 AND NOT a.attisdropped AND pg_catalog.pg_table_is_visible(c.oid) AND c.relname LIKE 'yj$_%' ESCAPE '$' ORDER BY c.relname, a.attnum`
	selectRights   = `SELECT account_name, table_name, right_name FROM (SELECT rolname AS account_name, '' AS table_name, CASE WHEN rolsuper THEN 'SUPERUSER ' ELSE '' END || CASE WHEN rolcreatedb THEN 'CREATEDB ' ELSE '' END || CASE WHEN rolcreaterole THEN 'CREATEROLE ' ELSE '' END || CASE WHEN rolcanlogin THEN 'LOGIN' ELSE '' END AS right_name FROM pg_catalog.pg_roles WHERE left(rolname, 3) <> 'pg_' UNION ALL SELECT CASE WHEN a.grantee = 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee)::text END, c.relname::text, a.privilege_type FROM pg_catalog.pg_class c, aclexplode(COALESCE(c.relacl, acldefault('r', c.relowner))) a WHERE c.relkind IN ('r', 'p') AND pg_catalog.pg_table_is_visible(c.oid) AND c.relname LIKE 'yj$_%' ESCAPE '$') r ORDER BY 1, 2, 3`
	currentSetting = `SELECT current_setting($1)`
	selectVersion  = `SELECT version()`
	selectRecovery = `SELECT CASE WHEN pg_is_in_recovery() THEN 'standby' ELSE 'primary' END`
	selectEmpty    = `SELECT CASE WHEN '' IS NULL THEN 'NULL' ELSE 'text' END`
)

// classify goes by SQLSTATE (PostgreSQL 15, appendix A).
func classify(err error) error {
	var pe *pgconn.PgError
	if errors.Is(err, pgconn.ErrReadOnlyConnection) { // of several hosts none takes writes
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrReadOnly, dbdriver.ErrUnavailable, err)
	}
	if !errors.As(err, &pe) {
		return fmt.Errorf("%w: %v", dbdriver.ErrUnavailable, err)
	}
	switch pe.Code {
	case "23505": // unique_violation
		return fmt.Errorf("%w: %v", dbdriver.ErrConflict, err)
	case "40P01", "40001", "55P03": // deadlock_detected, serialization_failure, lock_not_available
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrDeadlock, dbdriver.ErrUnavailable, err)
	case "25006": // read_only_sql_transaction
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrReadOnly, dbdriver.ErrUnavailable, err)
	case "53100": // disk_full
		return fmt.Errorf("%w (%w): %v", dbdriver.ErrFull, dbdriver.ErrUnavailable, err)
	case "XX001", "XX002": // data_corrupted, index_corrupted
		return fmt.Errorf("%w: %v", dbdriver.ErrDamaged, err)
	case "42P01", "42703", "42501", "3F000": // undefined_table, undefined_column, insufficient_privilege, invalid_schema_name
		return fmt.Errorf("%w: %v", dbdriver.ErrUnfit, err)
	}
	return fmt.Errorf("%w: %v", dbdriver.ErrUnavailable, err)
}

// A wish is what a setting should be.
type wish struct {
	name, query string
	arg         []any
	judge       func(value string) (central.Verdict, string)
}

func want(value string, otherwise central.Verdict, why string) func(string) (central.Verdict, string) {
	return func(got string) (central.Verdict, string) {
		if strings.EqualFold(got, value) {
			return central.Fit, ""
		}
		return otherwise, why
	}
}

func wanted(name, value string, otherwise central.Verdict, why string) wish {
	return wish{name, currentSetting, []any{name}, want(value, otherwise, why)}
}

var wishes = []wish{
	{"version", selectVersion, nil, func(string) (central.Verdict, string) { return central.Fit, "" }},
	{"role", selectRecovery, nil, want("primary", central.Unfit, "备库只读 (a standby takes no writes)")},
	wanted("server_encoding", "UTF8", central.Unfit, "库须以 UTF8 建立 (the database must have been made with UTF8)"),
	wanted("client_encoding", "UTF8", central.Unfit, "须为 UTF8 (UTF8 is wanted)"),
	wanted("standard_conforming_strings", "on", central.Unfit, "须为 on：否则反斜线有特殊含义 (otherwise backslashes mean something)"),
	wanted("default_transaction_read_only", "off", central.Unfit, "此库或此账户只读 (this database or account reads only)"),
	wanted("default_transaction_isolation", "read committed", central.Doubtful, "本系统写入的事务自行要求 read committed；此设置只及于查询 (what is written asks for read committed itself; this concerns queries only)"),
	wanted("fsync", "on", central.Doubtful, "断电可能损坏整个库 (a power cut may damage the database)"),
	wanted("full_page_writes", "on", central.Doubtful, "断电可能损坏整个库 (a power cut may damage the database)"),
	wanted("synchronous_commit", "on", central.Doubtful, "断电或切换可能丢失最后的提交；投递会补上 (the last commits may go with a power cut or a switch; they are shipped again)"),
	{"empty text", selectEmpty, nil, want("text", central.Doubtful, "空串等于 NULL；本系统不存空串 (empty text is NULL there; we store none)")},
}

// settings asks for each; what the server does not know or does not tell is "not checked".
func settings(ctx context.Context, db *sql.DB) ([]central.Setting, error) {
	var out []central.Setting
	for _, w := range wishes {
		s := central.Setting{Name: w.name}
		err := db.QueryRowContext(ctx, w.query, w.arg...).Scan(&s.Value)
		var pe *pgconn.PgError
		switch {
		case err == nil:
			s.Verdict, s.Why = w.judge(s.Value)
			s.ReadOnly = s.Verdict == central.Unfit && (w.name == "role" || w.name == "default_transaction_read_only")
		case errors.As(err, &pe):
			s.Verdict, s.Why = central.NotChecked, pe.Message
		default:
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}
