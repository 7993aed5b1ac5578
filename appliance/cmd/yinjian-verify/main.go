// Command yinjian-verify judges evidence, CMS messages, raw signatures and timestamp tokens without the appliance: no
// network, no database, no cgo. It exits 0 when the verdict is valid, 1 when it is not, 2 when it was misused.
//
// It reads files and a clock of nobody: what is judged is judged at the time its timestamp says. Only a signature
// without timestamp needs --at.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
	"yinjian/tsa"
)

const usage = `离线验证印鉴的证据 (verify evidence without the appliance)

  yinjian-verify --anchors DIR --log-key FILE [--document FILE] EVIDENCE.json
  yinjian-verify --anchors DIR --cms FILE       [--document FILE] [--crls DIR] [--at TIME]
  yinjian-verify --anchors DIR --token FILE     [--document FILE] [--crls DIR]
  yinjian-verify --anchors DIR --raw FILE --certificate FILE --document FILE [--crls DIR] [--at TIME]

退出码 exit status: 0 有效 valid; 1 无效或无法判定 invalid or indeterminate; 2 用法错误 misuse

`

type options struct {
	anchors, logKey, document, crls, at, output string
	cms, token, raw, certificate                string
	evidence                                    string
}

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	var o options
	f := flag.NewFlagSet("yinjian-verify", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.Usage = func() {
		fmt.Fprint(stderr, usage)
		f.PrintDefaults()
	}
	f.StringVar(&o.anchors, "anchors", "", "信任锚：CA 证书的 PEM 文件或目录 (trust anchors: PEM file or folder)")
	f.StringVar(&o.logKey, "log-key", "", "日志公钥 PEM (the log's public key)")
	f.StringVar(&o.document, "document", "", "原文 (the document)")
	f.StringVar(&o.crls, "crls", "", "吊销列表目录：*.crl，DER (folder of CRLs, DER)")
	f.StringVar(&o.at, "at", "", "没有时间戳时按此时刻判断证书，RFC 3339 (time to judge at where there is no timestamp)")
	f.StringVar(&o.cms, "cms", "", "单独的 CMS (a CMS message by itself, DER)")
	f.StringVar(&o.token, "token", "", "单独的时间戳或时间戳响应 (a token or response by itself, DER)")
	f.StringVar(&o.raw, "raw", "", "单独的签名值 (a signature value by itself)")
	f.StringVar(&o.certificate, "certificate", "", "裸签名的证书 PEM，可含证书链 (certificate of a raw signature, and its chain)")
	f.StringVar(&o.output, "o", "text", "text 或 json")
	if err := f.Parse(args); err != nil {
		return 2
	}
	if f.NArg() == 1 {
		o.evidence = f.Arg(0)
	}
	if err := o.check(f.NArg()); err != nil {
		fmt.Fprintln(stderr, "用法错误 (usage):", err)
		return 2
	}
	report, err := o.verify()
	if err != nil {
		fmt.Fprintln(stderr, "失败 (failed):", err)
		return 1
	}
	if o.output == "json" {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		if err := enc.Encode(report); err != nil {
			fmt.Fprintln(stderr, "失败 (failed):", err)
			return 1
		}
	} else {
		show.Print(stdout, report)
	}
	if report.Verdict != pki.Valid {
		return 1
	}
	return 0
}

func (o *options) check(args int) error {
	kinds := 0
	for _, v := range []string{o.evidence, o.cms, o.token, o.raw} {
		if v != "" {
			kinds++
		}
	}
	switch {
	case args > 1 || kinds != 1:
		return errors.New("给出证据文件，或 --cms、--token、--raw 之一 (give evidence, or one of --cms, --token, --raw)")
	case o.anchors == "":
		return errors.New("缺少 --anchors：没有信任锚什么也证明不了 (without anchors nothing is proved)")
	case o.evidence != "" && o.logKey == "":
		return errors.New("缺少 --log-key (the log's key is needed for evidence)")
	case o.evidence == "" && o.logKey != "":
		return errors.New("--log-key 只用于证据文件 (--log-key goes with evidence)")
	case (o.raw != "") != (o.certificate != ""):
		return errors.New("--raw 与 --certificate 须一起给出 (--raw and --certificate go together)")
	case o.output != "text" && o.output != "json":
		return fmt.Errorf("-o %s：须为 text 或 json (must be text or json)", o.output)
	}
	return nil
}

func (o *options) verify() (*evidence.Report, error) {
	trust, err := show.LoadTrust(o.anchors, o.logKey)
	if err != nil {
		return nil, err
	}
	var in evidence.Input
	if o.document != "" {
		if in.Document, err = os.ReadFile(o.document); err != nil {
			return nil, err
		}
		if in.Document == nil {
			in.Document = []byte{}
		}
	}
	if o.at != "" {
		if in.At, err = time.Parse(time.RFC3339, o.at); err != nil {
			return nil, fmt.Errorf("--at: %w", err)
		}
	}
	if in.CRLs, err = readCRLs(o.crls); err != nil {
		return nil, err
	}
	switch {
	case o.evidence != "":
		data, err := os.ReadFile(o.evidence)
		if err != nil {
			return nil, err
		}
		b, err := evidence.Parse(data)
		if err != nil {
			return nil, err
		}
		return evidence.Verify(b, trust, in), nil
	case o.cms != "":
		data, err := os.ReadFile(o.cms)
		if err != nil {
			return nil, err
		}
		return evidence.VerifyCMS(data, trust, in), nil
	case o.token != "":
		data, err := os.ReadFile(o.token)
		if err != nil {
			return nil, err
		}
		if r, err := tsa.ParseResponse(data); err == nil && r.Token != nil {
			data = r.Token.DER
		}
		return evidence.VerifyToken(data, trust, in), nil
	}
	value, err := os.ReadFile(o.raw)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(o.certificate)
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
	return evidence.VerifyRaw(show.Algorithm(certs[0]), value, certs[0].Raw, chain, nil, trust, in), nil
}

func readCRLs(dir string) ([]*pki.CRL, error) {
	if dir == "" {
		return nil, nil
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.crl"))
	if err != nil {
		return nil, err
	}
	var out []*pki.CRL
	for _, name := range files {
		der, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		l, err := pki.ParseCRL(der)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out = append(out, l)
	}
	return out, nil
}
