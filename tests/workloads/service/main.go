// A small HTTP service whose latencies have known causes.
//
//	service [ADDRESS:PORT]
//
// listens there (127.0.0.1:0 if nothing is said), prints the address and serves:
//
//	/fast             answers at once
//	/spin?ms=N        computes for N ms of wall clock
//	/gc?mb=N&times=K  makes N MB of small linked objects and has them collected K times
//	/lock?n=N&ms=M    N goroutines take one lock after each other and hold it for M ms
//	/park?n=N         leaves N goroutines waiting for ever
//	/metrics          how long all these took: a classic histogram, in Prometheus's text format
//	/debug/pprof/     Go's own profiles
package main

import (
	"fmt"
	"net"
	"net/http"
	_ "net/http/pprof"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

var bounds = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1}

// histogram counts durations by bucket; the last bucket is of those above all bounds.
type histogram struct {
	buckets [11]atomic.Uint64
	sumNs   atomic.Uint64
}

func (h *histogram) observe(took time.Duration) {
	at := 0
	for at < len(bounds) && took.Seconds() > bounds[at] {
		at++
	}
	h.buckets[at].Add(1)
	h.sumNs.Add(uint64(took.Nanoseconds()))
}

func (h *histogram) write(w http.ResponseWriter, handler string) {
	const name = "http_request_duration_seconds"
	total := uint64(0)
	for at := range h.buckets {
		total += h.buckets[at].Load()
		bound := "+Inf"
		if at < len(bounds) {
			bound = strconv.FormatFloat(bounds[at], 'g', -1, 64)
		}
		fmt.Fprintf(w, "%s_bucket{handler=%q,le=%q} %d\n", name, handler, bound, total)
	}
	fmt.Fprintf(w, "%s_sum{handler=%q} %g\n", name, handler, float64(h.sumNs.Load())/1e9)
	fmt.Fprintf(w, "%s_count{handler=%q} %d\n", name, handler, total)
}

var (
	order      []string
	histograms = map[string]*histogram{}
)

// handle serves a path and measures it.
func handle(path string, serve func(r *http.Request)) {
	measured := &histogram{}
	order, histograms[path] = append(order, path), measured
	http.HandleFunc(path, func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		serve(r)
		measured.observe(time.Since(began))
		fmt.Fprintln(w, "done")
	})
}

func metrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	fmt.Fprintln(w, "# HELP go_goroutines Number of goroutines that currently exist.")
	fmt.Fprintln(w, "# TYPE go_goroutines gauge")
	fmt.Fprintf(w, "go_goroutines %d\n", runtime.NumGoroutine())
	fmt.Fprintln(w, "# HELP http_request_duration_seconds How long requests took.")
	fmt.Fprintln(w, "# TYPE http_request_duration_seconds histogram")
	for _, path := range order {
		histograms[path].write(w, path)
	}
}

func number(r *http.Request, name string, usual int) int {
	if value, err := strconv.Atoi(r.FormValue(name)); err == nil {
		return value
	}
	return usual
}

// spin computes until so much time has gone by, on the CPU or waiting for one.
func spin(ms int) uint64 {
	sum := uint64(1)
	for began := time.Now(); time.Since(began) < time.Duration(ms)*time.Millisecond; {
		for i := 0; i < 1000; i++ {
			sum = sum*2862933555777941757 + 3037000493
		}
	}
	return sum
}

type node struct {
	next, other *node
	payload     [6]uint64
}

// collectGarbage gives the collector pointers to follow: 64 bytes a node.
func collectGarbage(mb, times int) {
	var list *node
	for i := 0; i < mb<<14; i++ {
		list = &node{next: list, other: list}
	}
	for i := 0; i < times; i++ {
		runtime.GC()
	}
	runtime.KeepAlive(list)
}

var mutex sync.Mutex

// holdLock is what the others of a convoy wait for.
func holdLock(ms int) {
	mutex.Lock()
	defer mutex.Unlock()
	spin(ms)
}

func convoy(n, ms int) {
	var all sync.WaitGroup
	for i := 0; i < n; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			holdLock(ms)
		}()
	}
	all.Wait()
}

func park() { select {} }

func main() {
	address := "127.0.0.1:0"
	if len(os.Args) > 1 {
		address = os.Args[1]
	}
	handle("/fast", func(*http.Request) {})
	handle("/spin", func(r *http.Request) { spin(number(r, "ms", 10)) })
	handle("/gc", func(r *http.Request) { collectGarbage(number(r, "mb", 64), number(r, "times", 1)) })
	handle("/lock", func(r *http.Request) { convoy(number(r, "n", 50), number(r, "ms", 1)) })
	handle("/park", func(r *http.Request) {
		for i := 0; i < number(r, "n", 1); i++ {
			go park()
		}
	})
	http.HandleFunc("/metrics", metrics)
	listener, err := net.Listen("tcp", address)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(listener.Addr())
	fmt.Fprintln(os.Stderr, http.Serve(listener, nil))
	os.Exit(1)
}
