package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/emmansun/gmsm/sm3"

	"yinjian/appliance/assess"
	"yinjian/appliance/evidence"
	"yinjian/appliance/evidence/show"
	"yinjian/appliance/pki"
)

// A judged file is one line of a folder's summary.
type judged struct {
	File     string           `json:"file"`
	Document string           `json:"document,omitempty"` // the file that was taken for the document, "" when there is none
	Report   *evidence.Report `json:"report"`
}

// documents are the files of a folder by name without extension, and by digest.
type documents struct {
	named    map[string][]string
	digested map[string]string // of both algorithms, hex
}

// folder judges all *.json of a folder, one after the other. A document belongs to the evidence of the same name
// without extension; without such a file, to the evidence that records its digest. By the name first, so that a document
// that was changed is said to be changed and not to be absent.
func (o *options) folder(stdout io.Writer, trust evidence.Trust, in evidence.Input) (int, error) {
	files, err := filepath.Glob(filepath.Join(o.evidence, "*.json"))
	if err != nil {
		return 0, err
	}
	if len(files) == 0 {
		return 0, fmt.Errorf("%s 中没有 *.json (no evidence found)", o.evidence)
	}
	docs, err := findDocuments(o.document)
	if err != nil {
		return 0, err
	}
	var all []judged
	count := map[pki.Verdict]int{}
	for _, name := range files {
		j := judged{File: filepath.Base(name)}
		data, err := o.read(name, evidence.MaxBundle)
		if err == nil {
			b, bad := evidence.Parse(data)
			switch {
			case assess.IsPack(data):
				j.Report = assess.Verify(data, trust, in, o.nonce)
			case evidence.IsHistory(data):
				j.Report = older(data, trust, in)
			case bad != nil:
				j.Report = evidence.Unreadable(bad)
			default:
				own := in
				if j.Document, err = docs.of(name, b); j.Document != "" && err == nil {
					own.Document, err = o.read(filepath.Join(o.document, j.Document), maxDocument)
				}
				j.Report = evidence.Verify(b, trust, own)
			}
		}
		if err != nil {
			return 0, err
		}
		count[j.Report.Verdict]++
		all = append(all, j)
	}
	if o.output == "json" {
		err = printJSON(stdout, all)
	} else {
		printSummary(stdout, all, count)
	}
	switch {
	case count[pki.Invalid] > 0:
		return exitInvalid, err
	case count[pki.Indeterminate] > 0:
		return exitIndeterminate, err
	}
	return exitValid, err
}

func findDocuments(dir string) (documents, error) {
	d := documents{map[string][]string{}, map[string]string{}}
	if dir == "" {
		return d, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return d, fmt.Errorf("证据为文件夹时 --document 须为文件夹 (must be a folder): %w", err)
	}
	for _, e := range entries {
		if !e.Type().IsRegular() || filepath.Ext(e.Name()) == ".json" {
			continue
		}
		stem := strings.TrimSuffix(e.Name(), filepath.Ext(e.Name()))
		d.named[stem] = append(d.named[stem], e.Name())
		f, err := os.Open(filepath.Join(dir, e.Name()))
		if err != nil {
			return d, err
		}
		ours, theirs := sm3.New(), sha256.New()
		_, err = io.Copy(io.MultiWriter(ours, theirs), f)
		f.Close()
		if err != nil {
			return d, err
		}
		d.digested["SM3 "+hex.EncodeToString(ours.Sum(nil))] = e.Name()
		d.digested["SHA-256 "+hex.EncodeToString(theirs.Sum(nil))] = e.Name()
	}
	return d, nil
}

func (d documents) of(evidenceFile string, b *evidence.Bundle) (string, error) {
	stem := strings.TrimSuffix(filepath.Base(evidenceFile), filepath.Ext(evidenceFile))
	switch same := d.named[stem]; len(same) {
	case 0:
		return d.digested[b.Record.DigestAlgorithm+" "+b.Record.Digest], nil
	case 1:
		return same[0], nil
	default:
		return "", fmt.Errorf("%s：同名原文不止一个：%s (several documents of that name)", filepath.Base(evidenceFile), strings.Join(same, " "))
	}
}

var verdictWords = map[pki.Verdict]string{pki.Valid: "有效 valid", pki.Invalid: "无效 invalid", pki.Indeterminate: "无法判定 indeterminate"}

func printSummary(w io.Writer, all []judged, count map[pki.Verdict]int) {
	for _, j := range all {
		r := j.Report
		document := j.Document
		if document == "" {
			document = "无 none"
		}
		fmt.Fprintf(w, "%-12s %s\n  原文 document: %s\n", verdictWords[r.Verdict], show.Plain(j.File), show.Plain(document))
		if r.Signer != "" {
			fmt.Fprintf(w, "  签名人 signer: %s\n", show.Plain(r.Signer))
		}
		if r.GenTime != "" {
			fmt.Fprintf(w, "  签署时间 time: %s ± %s\n", r.GenTime, r.Accuracy)
		}
		if len(r.Missing) > 0 {
			fmt.Fprintf(w, "  缺少 missing: %s\n", strings.Join(r.Missing, " "))
		}
		for _, c := range r.Checks {
			if c.Status == pki.Failed {
				fmt.Fprintf(w, "  %s %s %s\n", show.Mark(c.Status), c.ID, show.Plain(c.Detail))
			}
		}
		for _, s := range r.Statements {
			fmt.Fprintf(w, "  ! %s\n", show.Plain(s))
		}
	}
	fmt.Fprintf(w, "共 %d 份 in all：有效 valid %d，无效 invalid %d，无法判定 indeterminate %d\n",
		len(all), count[pki.Valid], count[pki.Invalid], count[pki.Indeterminate])
}
