package main

import (
	"encoding/json"
	"fmt"
	"io"
	"sort"
	"strconv"
	"strings"
	"unicode"
)

// labels are what members are called before people, who read the name in JSON behind it.
var labels = map[string]string{
	"accepted_subject": "接受的主题", "added": "运行时添加", "admin": "管理员监听", "admin_local": "本机管理套接字", "alarms": "告警", "algorithm": "算法", "algorithms": "算法", "already": "已导入过", "api": "业务接口", "at": "时间",
	"before": "此前", "bound_ms": "误差上限（毫秒）", "burst": "突发数", "campus": "院区", "certificate": "证书", "certificates": "证书",
	"changed_at": "变更时间", "changed_by": "变更人", "checkpoint": "检查点", "checkpoints": "检查点", "consent": "同意方式", "counters": "自带计数的槽位",
	"days_left": "剩余天数", "department": "科室", "directory": "目录", "discarded": "作废", "done": "已完成", "elsewhere": "绕过工作进程", "entries": "条目", "epoch": "纪元",
	"evaluation": "评估", "failed": "故障", "fork": "分叉", "frozen": "冻结", "free_bytes": "剩余字节", "has_pin": "已设 PIN", "health": "自检", "hsm": "密码机", "id": "编号",
	"issuer": "签发者", "journal": "日志", "keys": "密钥", "keys_only_here": "仅此机有的密钥", "label": "标签", "lag": "落后", "latency_ms": "延迟（毫秒）", "last_error": "最近错误", "listeners": "监听", "machine": "所在密码机", "machines": "各密码机", "missing": "缺版本",
	"name": "名称", "node": "节点", "not_after": "有效期止", "not_before": "有效期起", "note": "说明", "objects": "对象", "open": "未决", "over_quota": "超出配额", "owner": "归属",
	"phase": "阶段", "pid": "进程号", "pin_locked": "PIN 已锁", "pin_locked_for": "被锁的应用", "production": "生产应用", "projection": "投影", "provenance": "来源",
	"rate": "每秒请求数", "ready": "可签名", "reason": "原因", "restarts": "重启次数", "revocation": "吊销状态", "revoked_at": "吊销时间",
	"rights": "权限", "role": "岗位", "serial": "序列号", "served": "已受理", "sessions": "会话数", "shipped": "已投递", "since": "自（UTC）", "since_s": "已持续（秒）", "slot": "槽位", "slots": "槽位", "sources": "来源", "stamp": "时间戳策略",
	"state": "状态", "status": "状态", "stopped": "已停用", "subject": "主题", "test": "测试", "time": "时间", "timestamp_sources": "时间戳来源", "tsa_plain": "明文时间戳",
	"entries_per_s": "每秒条目", "outcome": "结论", "over_s": "所计秒数", "reports": "最近的报告", "signatures_per_s": "每秒签名", "throughput": "近一分钟", "timestamps_per_s": "每秒时间戳", "work": "正在进行",
	"unaccounted": "无记录", "under_way": "在途", "unlisted": "未登记", "uptime_s": "已运行（秒）", "use": "用途", "uses": "密钥使用", "version": "版本", "waiting": "等待", "warnings": "警告", "weight": "份额", "withdrawn": "已撤回", "workers": "时间戳进程",
}

func label(key string) string {
	if l, ok := labels[key]; ok {
		return l + " " + key
	}
	return key
}

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
				fmt.Fprintf(w, "%s%s:\n", indent, label(k))
				printValue(w, indent+"  ", child)
			default:
				fmt.Fprintf(w, "%s%s: %s\n", indent, label(k), short(child))
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
	if n, ok := v.(json.Number); ok {
		if f, err := n.Float64(); err == nil && strings.Contains(s, ".") {
			return strconv.FormatFloat(f, 'f', 1, 64)
		}
	}
	if r := []rune(s); len(r) > 160 && !strings.ContainsFunc(s, unicode.IsSpace) {
		return string(r[:120]) + fmt.Sprintf("…（共 %d 字，-o json 看全部）", len(r))
	}
	return s
}

// A columns aligns cells that tabs separate, as text/tabwriter does, but by how wide they show: a Han character takes two
// places. The last cell of a line is not padded, and what would steer a terminal is replaced.
type columns struct {
	to   io.Writer
	text strings.Builder
}

func (c *columns) Write(b []byte) (int, error) { return c.text.Write(b) }

// flush writes the lines.
func (c *columns) flush() {
	var rows [][]string
	var widest []int
	for line := range strings.Lines(c.text.String()) {
		row := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		for i, cell := range row {
			row[i] = strings.Map(func(r rune) rune {
				if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) {
					return '?'
				}
				return r
			}, cell)
			if i == len(widest) {
				widest = append(widest, 0)
			}
			if i < len(row)-1 {
				widest[i] = max(widest[i], places(row[i]))
			}
		}
		rows = append(rows, row)
	}
	for _, row := range rows {
		for i, cell := range row {
			if i < len(row)-1 {
				cell += strings.Repeat(" ", widest[i]-places(cell)+2)
			}
			fmt.Fprint(c.to, cell)
		}
		fmt.Fprintln(c.to)
	}
}

// places is how many columns of a terminal a text takes.
func places(s string) (n int) {
	for _, r := range s {
		n++
		if unicode.Is(unicode.Han, r) || r >= 0x3000 && r <= 0x303f || r >= 0xff01 && r <= 0xff60 {
			n++
		}
	}
	return n
}
