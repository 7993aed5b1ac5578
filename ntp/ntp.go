// Package ntp answers three questions: what time is it, how wrong can that be, and who says so.
//
// It is pure: selection and the anchored clock work on values handed in. Talking NTP is ntp/source's work, reading
// the kernel's clocks ntp/sysclock's.
package ntp
