//! Limits and sizes of tunnel connections.

use std::time::Duration;

/// Limits and sizes, the same for a client's and a server's connections.
///
/// The defaults are those of contracts.md, section 2, and quality.md.
#[derive(Debug, Clone)]
pub struct Settings {
    /// From the first byte of TLS to the end of the HTTP/2 preface; for the pool, the TCP connect too.
    pub handshake_timeout: Duration,
    /// From CONNECT to its answer, which a server gives when it has reached the application.
    pub connect_timeout: Duration,
    /// How long a CONNECT may go unanswered before the peer is asked for a sign of life, and how long the peer may
    /// take to give one. Beyond it, the connection takes no more tunnels; those that are open wait for
    /// [`ping_timeout`](Settings::ping_timeout).
    pub doubt: Duration,
    /// How long a connection without tunnels is kept.
    pub idle_timeout: Duration,
    /// How often a PING is sent.
    pub ping_interval: Duration,
    /// How long a PING may go unanswered before the connection is given up.
    pub ping_timeout: Duration,
    /// Tunnels that a peer may have open on one connection; the pool opens no more either.
    pub max_streams: u32,
    /// Bytes that one tunnel may have in flight towards us.
    pub stream_window: u32,
    /// Bytes in flight towards us on a new connection, all tunnels together.
    pub connection_window: u32,
    /// What that grows to with proven traffic, while the process has budget for it.
    pub max_connection_window: u32,
    /// Largest frame accepted, 16 KiB to 16 MiB.
    pub max_frame: u32,
    /// Bytes of one tunnel that may wait to be sent.
    pub send_buffer: usize,
    /// Largest header block accepted, decoded.
    pub max_headers: u32,
    /// Tunnels that a peer may abandon before they were answered, within
    /// [`abandoned_within`](Settings::abandoned_within); beyond it, the connection ends (CVE-2023-44487).
    pub max_abandoned: u32,
    /// The time that [`max_abandoned`](Settings::max_abandoned) is counted over.
    pub abandoned_within: Duration,
    /// Frames that move nothing (SETTINGS, PING, WINDOW_UPDATE, PRIORITY, CONTINUATION, empty DATA) that a peer may
    /// send within [`overhead_within`](Settings::overhead_within), beside one for each 64 bytes that it was sent;
    /// beyond it, the connection ends (CVE-2019-9512, 9515, 9518).
    pub max_overhead: u32,
    /// The time that [`max_overhead`](Settings::max_overhead) is counted over.
    pub overhead_within: Duration,
    /// Connections a pool makes for one key because those it has are busy.
    pub spread: usize,
    /// Connections a pool makes for one key because those it has are full.
    pub max_connections: usize,
    /// Tunnels on a connection above which it counts as busy.
    pub busy_streams: u32,
    /// Tunnels that may wait for the first connection of one key.
    pub max_waiting: usize,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            doubt: Duration::from_secs(1),
            idle_timeout: Duration::from_secs(300),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            max_streams: 200,
            stream_window: 4 * 1024 * 1024,
            connection_window: 4 * 1024 * 1024,
            max_connection_window: 16 * 1024 * 1024,
            max_frame: 1024 * 1024,
            send_buffer: 512 * 1024,
            max_headers: 16 * 1024,
            max_abandoned: 200,
            abandoned_within: Duration::from_secs(10),
            max_overhead: 20_000,
            overhead_within: Duration::from_secs(10),
            spread: 4,
            max_connections: 512,
            busy_streams: 100,
            max_waiting: 4096,
        }
    }
}

/// DATA frames smaller than 256 bytes cost more memory than they carry; h2 ends a connection on which
/// too many wait unread. Relays read them off at once, so this is met by floods only.
pub(crate) const SMALL_FRAME_BUDGET: usize = 16 * 1024 * 1024;

/// Streams reset by us that are remembered, so that late frames for them are no error.
const REMEMBERED_RESETS: usize = 64;
/// Reset streams that a peer may leave in the accept queue (CVE-2023-44487).
const RESETS_BEFORE_ACCEPT: usize = 64;
/// Streams that we may have to reset for the peer's protocol errors in a connection's life.
const PROTOCOL_ERRORS: usize = 256;
/// How long a reset stream is remembered.
const RESET_MEMORY: Duration = Duration::from_secs(5);
/// The h2 library's table of header names; peers repeat the same few.
const HEADER_TABLE: u32 = 4096;

/// RFC 9113 §6.5.2: what a window and a frame size may be.
pub(crate) const LARGEST_WINDOW: u32 = (1 << 31) - 1;
const SMALLEST_FRAME: u32 = 1 << 14;
const LARGEST_FRAME: u32 = (1 << 24) - 1;

impl Settings {
    pub(crate) fn client(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window.min(LARGEST_WINDOW))
            .initial_connection_window_size(self.connection_window.min(LARGEST_WINDOW))
            .max_frame_size(self.max_frame.clamp(SMALLEST_FRAME, LARGEST_FRAME))
            .max_header_list_size(self.max_headers)
            .max_send_buffer_size(self.send_buffer.min(LARGEST_WINDOW as usize))
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            .reset_stream_duration(RESET_MEMORY)
            .max_pending_accept_reset_streams(RESETS_BEFORE_ACCEPT)
            .max_local_error_reset_streams(Some(PROTOCOL_ERRORS))
            .header_table_size(HEADER_TABLE)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .enable_push(false);
        builder
    }

    pub(crate) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window.min(LARGEST_WINDOW))
            .initial_connection_window_size(self.connection_window.min(LARGEST_WINDOW))
            .max_frame_size(self.max_frame.clamp(SMALLEST_FRAME, LARGEST_FRAME))
            .max_header_list_size(self.max_headers)
            .max_send_buffer_size(self.send_buffer.min(LARGEST_WINDOW as usize))
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            .reset_stream_duration(RESET_MEMORY)
            .max_pending_accept_reset_streams(RESETS_BEFORE_ACCEPT)
            .max_local_error_reset_streams(Some(PROTOCOL_ERRORS))
            .header_table_size(HEADER_TABLE)
            .data_frame_budget(SMALL_FRAME_BUDGET)
            .max_concurrent_streams(self.max_streams);
        builder
    }
}
