//! Sizes and limits of tunnel connections: of every connection, of a client's, of a server's, and of a pool.
//!
//! The defaults are those of the HBONE contract and of the benchmarks.

use std::time::Duration;

/// Settings of both ends of a connection.
#[derive(Debug, Clone)]
pub struct ConnectionSettings {
    /// How long a connection without tunnels is kept.
    pub idle_timeout: Duration,
    /// How long an accepted connection that is closing may be without tunnels: a peer that leaves GOAWAY unanswered is
    /// waited for that long. Tunnels in flight, and bytes of ended ones that the peer has yet to take, keep it open. At least
    /// 10 ms.
    pub drain_idle: Duration,
    /// How often a PING is sent.
    pub ping_interval: Duration,
    /// How long a PING may go unanswered before the connection is closed.
    pub ping_timeout: Duration,
    /// Bytes that one tunnel may have in flight towards us.
    pub stream_window: u32,
    /// Bytes in flight towards us on a new connection, all tunnels together, if the [budget](crate::WindowBudget) has
    /// room for it; 64 KiB otherwise.
    pub initial_window: u32,
    /// The size to which the window grows with proven traffic, while the budget has room for it.
    pub max_window: u32,
    /// Largest frame accepted, 16 KiB to 16 MiB.
    pub max_frame: u32,
    /// Bytes of one tunnel that may wait to be sent.
    pub send_buffer: usize,
    /// Largest header block accepted, decoded.
    pub max_headers: u32,
    /// Frames that carry nothing (SETTINGS, PING, WINDOW_UPDATE, PRIORITY, CONTINUATION, empty DATA) that a peer may
    /// send within [`overhead_period`](ConnectionSettings::overhead_period), in addition to one for each 64 bytes that
    /// it was sent. A peer above this limit is disconnected (CVE-2019-9512, 9515, 9518).
    pub max_overhead: u32,
    /// The period that [`max_overhead`](ConnectionSettings::max_overhead) is counted over.
    pub overhead_period: Duration,
}

impl Default for ConnectionSettings {
    fn default() -> ConnectionSettings {
        ConnectionSettings {
            idle_timeout: Duration::from_secs(300),
            drain_idle: Duration::from_secs(10),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            stream_window: 4 * 1024 * 1024,
            initial_window: 256 * 1024,
            max_window: 16 * 1024 * 1024,
            max_frame: 1024 * 1024,
            send_buffer: 512 * 1024,
            max_headers: 16 * 1024,
            max_overhead: 20_000,
            overhead_period: Duration::from_secs(10),
        }
    }
}

/// Settings of connections that we dial.
#[derive(Debug, Clone)]
pub struct ClientSettings {
    /// Settings of both ends.
    pub connection: ConnectionSettings,
    /// Budget of the dial, the TLS handshake and the HTTP/2 preface together.
    pub handshake_timeout: Duration,
    /// From CONNECT to its answer, which a server gives when it has reached the application.
    pub connect_timeout: Duration,
    /// How long a CONNECT may go unanswered before the peer is probed by a PING, and how long the peer may take to
    /// answer that. After this, the connection takes no more tunnels; open ones wait for
    /// [`ping_timeout`](ConnectionSettings::ping_timeout).
    pub probe_timeout: Duration,
}

impl Default for ClientSettings {
    fn default() -> ClientSettings {
        ClientSettings {
            connection: ConnectionSettings::default(),
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            probe_timeout: Duration::from_secs(1),
        }
    }
}

/// Settings of connections that we accept.
#[derive(Debug, Clone)]
pub struct ServerSettings {
    /// Settings of both ends.
    pub connection: ConnectionSettings,
    /// How long a client may take to send its first byte.
    pub first_byte_timeout: Duration,
    /// From the first byte of TLS to the end of the HTTP/2 preface.
    pub handshake_timeout: Duration,
    /// From CONNECT to its answer.
    pub connect_timeout: Duration,
    /// Tunnels that a peer may have open on one connection.
    pub max_streams: u32,
    /// Tunnels that a peer may abandon within a second of asking for them and before they were answered, in one
    /// [`abandoned_period`](ServerSettings::abandoned_period). A peer above this limit is disconnected (CVE-2023-44487).
    pub max_abandoned: u32,
    /// The period that [`max_abandoned`](ServerSettings::max_abandoned) is counted over.
    pub abandoned_period: Duration,
}

impl Default for ServerSettings {
    fn default() -> ServerSettings {
        ServerSettings {
            connection: ConnectionSettings::default(),
            first_byte_timeout: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            max_streams: 200,
            max_abandoned: 200,
            abandoned_period: Duration::from_secs(10),
        }
    }
}

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    /// Settings of its connections.
    pub client: ClientSettings,
    /// Tunnels on one connection; fewer if the peer allows fewer.
    pub max_streams: u32,
    /// Connections made for one key because the existing ones are busy.
    pub spread: usize,
    /// Connections made for one key because the existing ones are full.
    pub max_connections: usize,
    /// Number of tunnels above which a connection counts as busy.
    pub busy_streams: u32,
    /// Tunnels that may wait for a connection of one key that is being dialled.
    pub max_waiting: usize,
}

impl Default for PoolSettings {
    fn default() -> PoolSettings {
        PoolSettings {
            client: ClientSettings::default(),
            max_streams: 200,
            spread: 4,
            max_connections: 512,
            busy_streams: 100,
            max_waiting: 4096,
        }
    }
}

/// DATA frames smaller than 256 bytes cost more memory than they carry; h2 ends a connection on which
/// too many wait unread. Relays read them at once, so only floods reach this limit.
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

impl ConnectionSettings {
    /// The client's side of HTTP/2, with a connection window of `window` bytes.
    pub(crate) fn client(&self, window: u32) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window.min(LARGEST_WINDOW))
            .initial_connection_window_size(window)
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
}

impl ServerSettings {
    /// The server's side of HTTP/2, with a connection window of `window` bytes.
    pub(crate) fn server(&self, window: u32) -> h2::server::Builder {
        let settings = &self.connection;
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(settings.stream_window.min(LARGEST_WINDOW))
            .initial_connection_window_size(window)
            .max_frame_size(settings.max_frame.clamp(SMALLEST_FRAME, LARGEST_FRAME))
            .max_header_list_size(settings.max_headers)
            .max_send_buffer_size(settings.send_buffer.min(LARGEST_WINDOW as usize))
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
