// Command yinjian-verify judges evidence, CMS messages, raw signatures and timestamp tokens without the appliance: no
// network, no database, no cgo. It exits 0 when the verdict is valid, 1 when it is invalid, 3 when it is indeterminate,
// and 2 when it was misused or could not read what it was given to judge with.
//
// It reads files and a clock of nobody: what is judged is judged at the time its timestamp says. A signature without
// timestamp needs --at, and whoever wants to know whether timestamps still count years later. What it reads is bounded, for the files come from whoever wants to be believed.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"yinjian/appliance/assess"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

const usage = `离线验证印鉴的证据 (verify evidence without the appliance)

  yinjian-verify --anchors DIR --log-key FILE [--cosigner-key FILE] [--document FILE] [--at TIME] EVIDENCE.json
  yinjian-verify --anchors DIR --log-key FILE --nonce NONCE PACK.json    密评证据包 (an evaluator's pack)
  yinjian-verify --anchors DIR --log-key FILE [--document DIR]  DIR    文件夹内全部 *.json (all *.json of a folder)
  yinjian-verify --anchors DIR --cms FILE       [--document FILE] [--crls DIR] [--at TIME]
  yinjian-verify --anchors DIR --token FILE     [--document FILE] [--query FILE] [--crls DIR] [--at TIME]
  yinjian-verify --anchors DIR --raw FILE --certificate FILE --document FILE [--token FILE] [--crls DIR] [--at TIME]

"-" 表示标准输入，只能用一次 (stands for standard input, once)
退出码 exit status: 0 有效 valid; 1 无效 invalid; 2 用法错误或读不到文件 misuse, or a file cannot be read; 3 无法判定 indeterminate
文件夹：取最差者，无效重于无法判定 (of a folder the worst, invalid before indeterminate)

`

// Exit statuses.
const (
	exitValid = iota
	exitInvalid
	exitMisused
	exitIndeterminate
)

// Bounds of what is read, in bytes. A document is held in memory, since a raw signature is over all of it.
const (
	maxDocument = 1 << 30
	maxMessage  = 64 << 20 // a CMS may hold its content
	maxPart     = 4 << 20  // token, signature value, certificates, CRL each
)

type options struct {
	anchors, logKey, cosignerKey string
	document, crls, at, output   string
	cms, token, raw, certificate string
	evidence, record, query      string
	nonce                        string
	ends                         ends

	stdin io.Reader
}

// ends are times from which algorithms are not relied on, as flags give them.
type ends map[string]time.Time

func (e ends) String() string { return "" }

// Set satisfies flag.Value.
func (e *ends) Set(v string) error {
	name, text, _ := strings.Cut(v, "=")
	at, err := time.Parse(time.RFC3339, text)
	if err != nil || name == "" {
		return fmt.Errorf("%q：须如 SM2=2045-01-01T00:00:00Z (must be like that)", v)
	}
	if !evidence.KnownAlgorithm(name) {
		return fmt.Errorf("%q：须为 SM2、SM3、SHA-256、SHA-384、SHA-512 或 RSA-2048 之类 (no algorithm is known by this name)", name)
	}
	if *e == nil {
		*e = ends{}
	}
	(*e)[name] = at
	return nil
}

func main() { os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) }

func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	o := options{stdin: stdin}
	f := flag.NewFlagSet("yinjian-verify", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {
		fmt.Fprint(stderr, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.anchors, "anchors", "", "信任锚：CA 证书的 PEM 文件或目录 (trust anchors: PEM file or folder)")
	f.StringVar(&o.logKey, "log-key", "", "日志公钥 PEM (the log's public key)")
	f.StringVar(&o.cosignerKey, "cosigner-key", "", "另一院区的日志公钥 PEM：核对其见证签名 (the other campus's log key: checks its cosignature)")
	f.StringVar(&o.document, "document", "", "原文；证据为文件夹时可为文件夹 (the document; a folder for a folder of evidence)")
	f.StringVar(&o.crls, "crls", "", "吊销列表目录：*.crl，DER (folder of CRLs, DER)")
	f.StringVar(&o.at, "at", "", "按此时刻判断，RFC 3339：时间戳是否已到期，没有时间戳的证书是否有效；从不取本机时间 (time to judge at: whether timestamps have ended, and certificates where there is none; never the machine's own)")
	f.Var(&o.ends, "algorithm-end", "某算法自某时刻起不再可信，如 SM2=2045-01-01T00:00:00Z，可重复，与 --at 同用 (an algorithm that is not relied on any more from a time on; may be repeated, goes with --at)")
	f.StringVar(&o.record, "evidence-record", "", "证据文件旁的存档证据记录，DER (an evidence record beside the evidence, RFC 4998)")
	f.StringVar(&o.cms, "cms", "", "单独的 CMS (a CMS message by itself, DER)")
	f.StringVar(&o.token, "token", "", "单独的时间戳或时间戳响应；与 --raw 同用时为裸签名的时间戳 (a token or response by itself, DER; with --raw that of the signature)")
	f.StringVar(&o.query, "query", "", "单独的时间戳所回答的请求 (the request that a token by itself answers, DER)")
	f.StringVar(&o.raw, "raw", "", "单独的签名值 (a signature value by itself)")
	f.StringVar(&o.certificate, "certificate", "", "裸签名的证书 PEM，可含证书链 (certificate of a raw signature, and its chain)")
	f.StringVar(&o.nonce, "nonce", "", "密评证据包：测评方给出的随机数 (of an evaluator's pack: the assessor's nonce)")
	f.StringVar(&o.output, "o", "text", "text 或 json")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		return exitValid
	} else if err != nil {
		return exitMisused
	}
	if f.NArg() == 1 {
		o.evidence = f.Arg(0)
	}
	if err := o.check(f.NArg()); err != nil {
		fmt.Fprintln(stderr, "用法错误 (usage):", err)
		return exitMisused
	}
	status, err := o.judge(stdout)
	if err != nil {
		fmt.Fprintln(stderr, "失败 (failed):", show.Plain(err.Error()))
		return exitMisused
	}
	return status
}

func (o *options) check(args int) error {
	kinds, inputs := 0, 0
	for _, v := range []string{o.evidence, o.cms, o.token, o.raw} {
		if v != "" {
			kinds++
		}
	}
	if o.raw != "" && o.token != "" {
		kinds--
	}
	for _, v := range []string{o.evidence, o.record, o.cms, o.token, o.query, o.raw, o.document, o.certificate} {
		if v == "-" {
			inputs++
		}
	}
	switch {
	case args > 1 || kinds != 1:
		return errors.New("给出证据文件，或 --cms、--token、--raw 之一 (give evidence, or one of --cms, --token, --raw)")
	case inputs > 1:
		return errors.New("标准输入只能用一次 (standard input can be read once)")
	case o.anchors == "":
		return errors.New("缺少 --anchors：没有信任锚什么也证明不了 (without anchors nothing is proved)")
	case o.evidence != "" && o.logKey == "":
		return errors.New("缺少 --log-key (the log's key is needed for evidence)")
	case o.evidence == "" && o.logKey != "":
		return errors.New("--log-key 只用于证据文件 (--log-key goes with evidence)")
	case o.evidence == "" && o.cosignerKey != "":
		return errors.New("--cosigner-key 只用于证据文件 (--cosigner-key goes with evidence)")
	case (o.raw != "") != (o.certificate != ""):
		return errors.New("--raw 与 --certificate 须一起给出 (--raw and --certificate go together)")
	case o.evidence == "" && o.record != "":
		return errors.New("--evidence-record 只用于证据文件 (--evidence-record goes with evidence)")
	case o.query != "" && (o.token == "" || o.raw != ""):
		return errors.New("--query 只用于单独的时间戳 (--query goes with a token by itself)")
	case o.evidence == "" && o.nonce != "":
		return errors.New("--nonce 只用于密评证据包 (--nonce goes with an evaluator's pack)")
	case len(o.ends) > 0 && o.at == "":
		return errors.New("--algorithm-end 须与 --at 同用 (goes with --at)")
	case o.output != "text" && o.output != "json":
		return fmt.Errorf("-o %s：须为 text 或 json (must be text or json)", o.output)
	}
	return nil
}

func (o *options) read(name string, limit int64) ([]byte, error) {
	return show.ReadFile(name, o.stdin, limit)
}

// judge prints what is found and answers the exit status. An error is about what one judges with, not about what is
// judged.
func (o *options) judge(stdout io.Writer) (int, error) {
	trust, err := show.LoadTrust(o.anchors, o.logKey)
	if err != nil {
		return 0, err
	}
	if err := show.LoadCosigner(&trust, o.cosignerKey); err != nil {
		return 0, err
	}
	in := evidence.Input{AlgorithmEnds: o.ends}
	if o.at != "" {
		if in.At, err = time.Parse(time.RFC3339, o.at); err != nil {
			return 0, fmt.Errorf("--at: %w", err)
		}
	}
	if in.CRLs, err = show.ReadCRLs(o.crls); err != nil {
		return 0, err
	}
	if st, err := os.Stat(o.evidence); err == nil && st.IsDir() {
		if o.record != "" {
			return 0, errors.New("--evidence-record 属于一份证据，不用于文件夹 (belongs to one file of evidence)")
		}
		return o.folder(stdout, trust, in)
	}
	if o.document != "" {
		if in.Document, err = o.read(o.document, maxDocument); err != nil {
			return 0, err
		}
	}
	report, err := o.one(trust, in)
	if err != nil {
		return 0, err
	}
	if o.output == "json" {
		err = printJSON(stdout, report)
	} else {
		show.Print(stdout, report)
	}
	return statuses[report.Verdict], err
}

var statuses = map[pki.Verdict]int{pki.Valid: exitValid, pki.Invalid: exitInvalid, pki.Indeterminate: exitIndeterminate}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func (o *options) one(trust evidence.Trust, in evidence.Input) (*evidence.Report, error) {
	switch {
	case o.evidence != "":
		data, err := o.read(o.evidence, evidence.MaxBundle)
		if err != nil {
			return nil, err
		}
		if evidence.IsHistory(data) && o.record == "" {
			return older(data, trust, in), nil
		}
		if o.nonce != "" || assess.IsPack(data) {
			return assess.Verify(data, trust, in, o.nonce), nil
		}
		b, err := evidence.Parse(data)
		if err != nil {
			return evidence.Unreadable(err), nil
		}
		if o.record != "" {
			record, err := o.read(o.record, evidence.MaxBundle)
			if err != nil {
				return nil, err
			}
			b = b.WithRecord(record)
		}
		return evidence.Verify(b, trust, in), nil
	case o.cms != "":
		data, err := o.read(o.cms, maxMessage)
		if err != nil {
			return nil, err
		}
		return evidence.VerifyCMS(data, trust, in), nil
	}
	var token []byte
	if o.token != "" {
		var err error
		if token, err = o.read(o.token, maxPart); err != nil {
			return nil, err
		}
		if r, err := tsa.ParseResponse(token); err == nil && r.Token != nil {
			token = r.Token.DER
		}
		if o.query != "" {
			der, err := o.read(o.query, maxPart)
			if err != nil {
				return nil, err
			}
			if in.Query, err = tsa.ParseRequest(der); err != nil {
				return nil, fmt.Errorf("%s: %w", o.query, err)
			}
		}
		if o.raw == "" {
			return evidence.VerifyToken(token, trust, in), nil
		}
	}
	value, err := o.read(o.raw, maxPart)
	if err != nil {
		return nil, err
	}
	text, err := o.read(o.certificate, maxPart)
	if err != nil {
		return nil, err
	}
	certs, err := pki.ParseCertificatePEMs(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.certificate, err)
	}
	if len(certs) == 0 {
		return nil, fmt.Errorf("%s: 没有证书 (no certificate)", o.certificate)
	}
	var chain [][]byte
	for _, c := range certs[1:] {
		chain = append(chain, c.Raw)
	}
	return evidence.VerifyRaw(show.Algorithm(certs[0]), value, certs[0].Raw, chain, token, trust, in), nil
}

// older judges the file about a record that was imported from an older system.
func older(data []byte, trust evidence.Trust, in evidence.Input) *evidence.Report {
	h, err := evidence.ParseHistory(data)
	if err != nil {
		return evidence.Unreadable(err)
	}
	return evidence.VerifyHistory(h, trust, in)
}
